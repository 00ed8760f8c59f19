"""The definition of a linear layer over an 8-bit weight, output by output."""

import torch
from torch import Tensor

from neural_layers.kernels.arguments import accumulation_dtype
from neural_layers.kernels.int8 import dequantize_rows, quantize_affine, quantize_rows


def linear_int8_reference(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    input_scale: Tensor | None = None,
    input_zero_point: Tensor | None = None,
) -> Tensor:
    """y_o = Σ_i x̂_i · scale_o · weight_oi + bias_o, with x̂ the 8-bit x."""
    wide = x.to(accumulation_dtype(x))
    # The value of the 8 bits, with the gradient of x.
    finite = wide.nan_to_num(nan=0.0, posinf=0.0, neginf=0.0)
    wide = _rounded(x, input_scale, input_zero_point).to(wide.dtype) + (finite - finite.detach())
    dense = dequantize_rows(weight, scale.detach(), wide.dtype)
    y = torch.stack([(wide * row).sum(dim=-1) for row in dense], dim=-1) if len(dense) else wide[..., :0]
    return (y if bias is None else y + bias).to(x.dtype)


def _rounded(x: Tensor, input_scale: Tensor | None, input_zero_point: Tensor | None) -> Tensor:
    """x̂ in float64, which holds the product of a code and a scale exactly."""
    if input_scale is None or input_zero_point is None:
        codes, row_scale = quantize_rows(x)
        return codes.double() * row_scale.double().unsqueeze(-1)
    codes = quantize_affine(x, input_scale, input_zero_point).double() + 128 - input_zero_point
    # A row with NaN has no codes.
    unknown = x.isnan().any(dim=-1, keepdim=True)
    return (codes * input_scale.detach().float().double()).masked_fill(unknown, torch.nan)
