"""The linear layer of all blocks."""

from torch import Tensor, nn

from neural_layers.kernels.linear import linear


class Linear(nn.Linear):
    """`torch.nn.Linear` on the op `linear`: the same parameters and results, and less time for the few
    rows of a decoding step."""

    def forward(self, input: Tensor) -> Tensor:
        return linear(input, self.weight, self.bias)
