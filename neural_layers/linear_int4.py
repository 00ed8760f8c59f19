"""A linear layer whose weight stays in 4 bits, with a scale and a zero point for each group."""

import torch
from torch import Tensor, nn

from neural_layers.frozen_bits import FrozenBits, check_finite
from neural_layers.kernels.dequantize_int4.pytorch import weight_in
from neural_layers.kernels.int4 import QuantizedInt4, check_quantized
from neural_layers.kernels.linear_int4 import linear_int4
from neural_layers.kernels.linear_int4.native import prepare
from neural_layers.kernels.prepared import Prepared, Tensors
from neural_layers.kernels.quantize_int4 import quantize_int4
from neural_layers.quantized_embedding import EmbeddingInt4


class LinearInt4(FrozenBits):
    """y = x Wᵀ + b with W_oi = scale_og · (code_oi − zero_point_og): (..., in) → (..., out) in the dtype of x.

    weight:        uint8 (out, groups · block_size / 2), codes 0 … 15, the first of a byte in its low half
    scale:         float32 (out, groups); zero_point: uint8 (out, groups)
    block_size:    inputs in a group: 16, 32, 64, 128 or 256
    device, dtype: where W is drawn, as `nn.Linear` draws it, before it is quantized, and the dtype of the bias

    W is frozen; the gradient flows to x and to the bias. The bits are buffers that move between devices and that no
    `.to(dtype)`, `.half()` or `.double()` changes; they are laid out as ONNX Runtime's MatMulNBits reads them.
    `load_state_dict` refuses a weight of another shape or dtype with an error that names both.
    """

    bits = ("weight", "scale", "zero_point")
    weight: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        block_size: int = 64,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        plain = nn.Linear(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.in_features, self.out_features = in_features, out_features
        self.bias = plain.bias
        for name in self.bits:
            self.register_buffer(name, None)
        self.quantized = quantize_int4(plain.weight, block_size)

    @classmethod
    def from_linear(cls, linear: nn.Linear, block_size: int = 64) -> "LinearInt4":
        """The layer with the weight of `linear` in 4 bits and a copy of its bias, on the same device.

        Raises TypeError for what is no nn.Linear, and ValueError for a weight with NaN or infinity.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear is a {type(linear).__name__}; expected an nn.Linear")
        layer = cls(linear.in_features, linear.out_features, bias=False, block_size=block_size, device="meta")
        layer.quantized = quantize_int4(linear.weight, block_size)
        check_finite(layer.scale)
        if linear.bias is not None:
            layer.bias = nn.Parameter(linear.bias.detach().clone(), requires_grad=linear.bias.requires_grad)
        return layer.train(linear.training)

    @property
    def quantized(self) -> QuantizedInt4:
        """The weight (out, in) as the int4 ops take it; assigning another of that shape replaces it."""
        constants = (self.block_size, self.shape, torch.float32)
        return QuantizedInt4(self.weight, self.scale, self.zero_point, *constants)

    @quantized.setter
    def quantized(self, record: QuantizedInt4) -> None:
        check_quantized(record)
        if record.shape != self.shape:
            raise ValueError(f"the quantized weight has shape {record.shape}; expected (out, in) = {self.shape}")
        self.weight, self.scale, self.zero_point = record.packed, record.scale, record.zero_point
        self.block_size, self._shared_with = record.block_size, ()

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.out_features, self.in_features

    def share(self, embedding: EmbeddingInt4) -> "LinearInt4":
        """Make the bits the very tensors of the embedding, as a head tied to it does; returns the layer.

        Raises TypeError for another kind of embedding and ValueError for one of another size.
        """
        self._share(embedding, EmbeddingInt4)
        self.block_size = embedding.block_size
        return self

    def dense_weight(self) -> Tensor:
        """W as the layer has it, (out, in) in float32."""
        return weight_in(self.quantized, torch.float32)

    def _prepare(self, tensors: Tensors) -> Prepared | None:
        check_quantized(self.quantized)
        return prepare(self.quantized, tensors[-1])

    def forward(self, x: Tensor) -> Tensor:
        done = self._quick(x)
        return done if done is not None else linear_int4(x, self.quantized, self.bias)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, block_size={self.block_size}"
