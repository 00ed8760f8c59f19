"""The definition of a linear layer over a 4-bit weight, output by output."""

import torch
from torch import Tensor

from neural_layers.kernels.arguments import accumulation_dtype
from neural_layers.kernels.dequantize_4bit.reference import weight_in
from neural_layers.kernels.four_bit import Quantized4bit


def linear_4bit_reference(x: Tensor, quantized: Quantized4bit, bias: Tensor | None = None) -> Tensor:
    """y_o = Σ_i x_i · W_oi + bias_o."""
    wide = x.to(accumulation_dtype(x))
    weight = weight_in(quantized, wide.dtype)
    y = torch.stack([(wide * row).sum(dim=-1) for row in weight], dim=-1) if len(weight) else wide[..., :0]
    return (y if bias is None else y + bias).to(x.dtype)
