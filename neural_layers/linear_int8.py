"""A linear layer whose weight, and in every call whose input, is in 8 bits."""

import torch
from torch import Tensor, nn

from neural_layers.frozen_bits import FrozenBits, check_finite
from neural_layers.kernels.int8 import dequantize_rows, quantize_rows
from neural_layers.kernels.linear_int8 import linear_int8
from neural_layers.kernels.linear_int8.native import prepare
from neural_layers.kernels.prepared import Prepared, Tensors
from neural_layers.quantized_embedding import EmbeddingInt8


class LinearInt8(FrozenBits):
    """y = x Wᵀ + b with W in 8 bits, a scale for each output (arXiv 1712.05877): (..., in) → (..., out), dtype of x.

    weight:           int8 (out, in), −127 … 127; scale: float32 (out,): W_oi ≈ scale_o · weight_oi
    input_scale, input_zero_point: float32 () and int32 (), or None. None: each row of x has a scale of its own in every
                      call (dynamic), so that a token's result does not depend on what else is in the batch. Given by
                      `calibrate`: x is rounded with them (static).
    device, dtype:    where W is drawn, as `nn.Linear` draws it, before it is quantized, and the dtype of the bias
    static:           whether the state has an input_scale (1) and input_zero_point (128) from the start, to be loaded

    W is frozen; the gradient flows to x and to the bias, through the rounding as if there were none. The bits are
    buffers that move between devices and that no `.to(dtype)`, `.half()` or `.double()` changes. `load_state_dict`
    refuses a weight of another shape or dtype with an error that names both.
    """

    bits = ("weight", "scale", "input_scale", "input_zero_point")
    own_bits = ("input_scale", "input_zero_point")
    weight: Tensor
    scale: Tensor
    input_scale: Tensor | None
    input_zero_point: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        static: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        plain = nn.Linear(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.in_features, self.out_features = in_features, out_features
        self.bias = plain.bias
        weight, scale = quantize_rows(plain.weight)
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)
        self.register_buffer("input_scale", None)
        self.register_buffer("input_zero_point", None)
        if static:
            self.calibrate(1.0, 128)

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> "LinearInt8":
        """The dynamic layer with the weight of `linear` in 8 bits and a copy of its bias, on the same device.

        Raises TypeError for what is no nn.Linear, and ValueError for a weight with NaN or infinity.
        """
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear is a {type(linear).__name__}; expected an nn.Linear")
        layer = cls(linear.in_features, linear.out_features, bias=False, device="meta")
        layer.weight, layer.scale = quantize_rows(linear.weight)
        check_finite(layer.scale)
        if linear.bias is not None:
            layer.bias = nn.Parameter(linear.bias.detach().clone(), requires_grad=linear.bias.requires_grad)
        return layer.train(linear.training)

    def calibrate(self, input_scale: float | Tensor, input_zero_point: int | Tensor) -> None:
        """Round x with this scale and this zero point, 0 … 255, from now on (static).

        Raises ValueError for a scale that is not positive and finite, or another zero point.
        """
        device = self.weight.device
        scale = torch.as_tensor(input_scale, dtype=torch.float32, device=device).clone()
        zero_point = torch.as_tensor(input_zero_point, dtype=torch.int32, device=device).clone()
        if scale.ndim or zero_point.ndim:
            shapes = f"{tuple(scale.shape)} and {tuple(zero_point.shape)}"
            raise ValueError(f"input_scale and input_zero_point have shapes {shapes}; expected one number each")
        if not scale.is_meta and not 0 < scale < torch.inf:
            raise ValueError(f"input_scale={scale.item()} must be positive and finite")
        if not zero_point.is_meta and not 0 <= zero_point <= 255:
            raise ValueError(f"input_zero_point={zero_point.item()} must be from 0 to 255")
        self.input_scale, self.input_zero_point = scale, zero_point

    @property
    def static(self) -> bool:
        """Whether x is rounded with a scale that was calibrated."""
        return self.input_scale is not None

    def share(self, embedding: EmbeddingInt8) -> "LinearInt8":
        """Make weight and scale the very tensors of the embedding, as a head tied to it does; returns the layer.

        Raises TypeError for another kind of embedding and ValueError for one of another size.
        """
        self._share(embedding, EmbeddingInt8)
        return self

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.out_features, self.in_features

    def dense_weight(self) -> Tensor:
        """W as the layer has it, (out, in) in float32."""
        return dequantize_rows(self.weight, self.scale)

    def _prepare(self, tensors: Tensors) -> Prepared | None:
        return prepare(tensors)

    def forward(self, x: Tensor) -> Tensor:
        done = self._quick(x)
        if done is not None:
            return done
        own = self._buffers
        scale, zero_point = own["input_scale"], own["input_zero_point"]
        return linear_int8(x, self.weight, self.scale, self.bias, input_scale=scale, input_zero_point=zero_point)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, static={self.static}"
