"""Rounding to 8 bits: of a weight once, a scale for each row; of activations in every call (arXiv 1712.05877).

All of it is float32 arithmetic, whatever the dtype: the rounding decides between two codes, so that another precision
would be another result. So every backend multiplies the same integers.
"""

import torch
from torch import Tensor

LARGEST = 127
# Rows of smaller numbers count as zero: the reciprocal of their scale would overflow.
TINY = 2.0**-120


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Codes and scales of the rows of x (…, in): scale = max |x| / 127, code = round(x · (127 / max |x|)).

    Ties round to even. Returns int8 (…, in), −127 … 127, and float32 (…). A row that holds NaN or infinity has codes 0
    and the scale NaN; a row below 2^-120 in magnitude has codes 0.
    """
    x = x.detach().float()
    if not x.shape[-1]:
        return x.to(torch.int8), x.new_zeros(x.shape[:-1])
    most = x.abs().amax(dim=-1)
    finite = most < torch.inf
    # A number divided by a tensor, in torch, is its reciprocal times the number, which rounds twice.
    inverse = torch.where(finite & (most >= TINY), torch.full_like(most, LARGEST) / most, 0)
    codes = (x * inverse.unsqueeze(-1)).round()
    codes = torch.where(finite.unsqueeze(-1), codes, 0).to(torch.int8)
    return codes, torch.where(finite, most / LARGEST, torch.nan)


def quantize_affine(x: Tensor, input_scale: Tensor, input_zero_point: Tensor) -> Tensor:
    """clamp(round(x / s) + z, 0, 255) − 128 as int8, ties to even; of NaN, −128."""
    codes = (x.detach().float() / input_scale.float()).round() + input_zero_point
    return (codes.nan_to_num(nan=0.0).clamp(0, 255) - 128).to(torch.int8)


def dequantize_rows(weight: Tensor, scale: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """scale · code in `dtype`, for codes (…, in) and scales (…)."""
    return weight.to(dtype) * scale.to(dtype).unsqueeze(-1)
