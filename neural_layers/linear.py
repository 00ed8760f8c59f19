"""The linear layer of all blocks, and the weight of any layer as one matrix."""

from typing import Any

from torch import Tensor, nn

from neural_layers.kernels.linear import linear


class Linear(nn.Linear):
    """`torch.nn.Linear` on the op `linear`: the same parameters and results, and less time for the few
    rows of a decoding step."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)


def dense_weight(module: nn.Module) -> Tensor:
    """The matrix (outputs, inputs) that `module` multiplies by, for a loss that takes it instead of calling the module.

    `module.dense_weight()` where it has one (a quantized layer's weight in full, an adapter's W + ΔW with its
    gradient), else `module.weight`. Raises TypeError for a module that has neither.
    """
    own: Any = getattr(module, "dense_weight", None)
    weight: Any = own() if callable(own) else getattr(module, "weight", None)
    if not isinstance(weight, Tensor):
        raise TypeError(f"{type(module).__name__} has neither a dense_weight() nor a weight; expected a linear layer")
    return weight
