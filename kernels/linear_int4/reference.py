"""The definition of a linear layer over an affine 4-bit weight, output by output."""

import torch
from torch import Tensor

from neural_layers.kernels.arguments import accumulation_dtype
from neural_layers.kernels.dequantize_int4.reference import weight_in
from neural_layers.kernels.int4 import QuantizedInt4


def linear_int4_reference(x: Tensor, quantized: QuantizedInt4, bias: Tensor | None = None) -> Tensor:
    """y_o = Σ_i x_i · scale_og · (code_oi − zero_point_og) + bias_o."""
    wide = x.to(accumulation_dtype(x))
    weight = weight_in(quantized, wide.dtype)
    y = torch.stack([(wide * row).sum(dim=-1) for row in weight], dim=-1) if len(weight) else wide[..., :0]
    return (y if bias is None else y + bias).to(x.dtype)
