"""A linear layer whose weight stays in 4 bits."""

import torch
from torch import Tensor, nn

from neural_layers.four_bit_weight import FourBitWeight
from neural_layers.kernels.dequantize_4bit.pytorch import weight_in
from neural_layers.kernels.four_bit import check_quantized
from neural_layers.kernels.linear_4bit import linear_4bit
from neural_layers.kernels.linear_4bit.native import prepare
from neural_layers.kernels.prepared import Prepared, Tensors
from neural_layers.kernels.quantize_4bit import quantize_4bit
from neural_layers.quantized_embedding import Embedding4bit


class Linear4bit(FourBitWeight):
    """y = x Wᵀ + b with W in NF4 or FP4 (arXiv 2305.14314): (..., in) → (..., out) in the dtype of x.

    quant_type, block_size, double_quant: of `quantize_4bit`.
    device, dtype: where W is drawn, as `nn.Linear` draws it, before it is quantized, and the dtype of the bias.

    W is frozen; the gradient flows to x and to the bias. Its bits are buffers that move between devices and that no
    `.to(dtype)`, `.half()` or `.double()` changes. `state_dict` has the keys and the bits that bitsandbytes' Linear4bit
    writes and reads: `weight`, `weight.absmax`, `weight.quant_map`, `weight.nested_absmax`, `weight.nested_quant_map`
    and `weight.quant_state.bitsandbytes__nf4` (or `fp4`), a JSON text. `load_state_dict` refuses a weight of another
    shape, quant_type, block_size or nesting with an error that names both.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        quant_type: str = "nf4",
        block_size: int = 64,
        double_quant: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        plain = nn.Linear(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.in_features, self.out_features = in_features, out_features
        self.bias = plain.bias
        self._register_bits()
        self.quantized = quantize_4bit(plain.weight, quant_type, block_size, double_quant)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, quant_type: str = "nf4", block_size: int = 64, double_quant: bool = False
    ) -> "Linear4bit":
        """The layer with the weight of `linear` in 4 bits and a copy of its bias, on the same device."""
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear is a {type(linear).__name__}; expected an nn.Linear")
        layer = cls(linear.in_features, linear.out_features, bias=False, device="meta")
        layer.quantized = quantize_4bit(linear.weight, quant_type, block_size, double_quant)
        if linear.bias is not None:
            layer.bias = nn.Parameter(linear.bias.detach().clone(), requires_grad=linear.bias.requires_grad)
        return layer.train(linear.training)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.out_features, self.in_features

    def share(self, embedding: Embedding4bit) -> "Linear4bit":
        """Make the bits the very tensors of the embedding, as a head tied to it does; returns the layer.

        Raises TypeError for another kind of embedding and ValueError for one of another size.
        """
        self._share(embedding, Embedding4bit)
        self._set_format(embedding.quantized)
        return self

    def dense_weight(self) -> Tensor:
        """W as the layer has it, (out, in) in float32."""
        return weight_in(self.quantized, torch.float32)

    def _prepare(self, tensors: Tensors) -> Prepared | None:
        check_quantized(self.quantized)
        return prepare(self.quantized, tensors[-1])

    def forward(self, x: Tensor) -> Tensor:
        done = self._quick(x)
        return done if done is not None else linear_4bit(x, self.quantized, self.bias)

    def extra_repr(self) -> str:
        sizes = f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"
        return f"{sizes}, {self._format()}"
