"""The 8-bit linear layer in plain torch (backend `torch`), on any device."""

import torch
from torch import Tensor

from neural_layers.kernels.arguments import accumulation_dtype
from neural_layers.kernels.int8 import quantize_affine, quantize_rows

# The most inputs whose products of 8 bits add up to less than 2^31, and to less than 2^24, where float32 ends.
_INT32, _FLOAT32 = 1 << 16, 1 << 10


def product(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
) -> Tensor:
    """x̂ · weightᵀ in integers, times the scales, + bias."""
    dtype = accumulation_dtype(x)
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    if input_scale is None or input_zero_point is None:
        codes, row_scale = quantize_rows(rows)
        sums = integer_sums(codes, weight)
    else:
        # The codes are 128 less than those of the formula, and so is the zero point; NaN makes its row so.
        codes = quantize_affine(rows, input_scale, input_zero_point)
        sums = integer_sums(codes, weight) - (input_zero_point - 128) * weight.sum(dim=1)
        row_scale = torch.where(rows.isnan().any(dim=1), torch.nan, input_scale.float())
    y = sums.to(dtype) * (row_scale.to(dtype).unsqueeze(1) * scale.to(dtype))
    y = y if bias is None else y + bias
    return y.to(x.dtype).reshape(*x.shape[:-1], weight.shape[0])


def integer_sums(codes: Tensor, weight: Tensor) -> Tensor:
    """Σ_i codes_ri · weight_oi, exact: int64 (rows, out) of int8 (rows, in) and (out, in)."""
    sums = torch.zeros(codes.shape[0], weight.shape[0], dtype=torch.int64, device=codes.device)
    if not (sums.numel() and codes.shape[1]):
        return sums
    if codes.is_cpu:
        if codes.shape[1] % _INT32 == 1:
            # torch 2.13 multiplies a single column with others' memory.
            codes, weight = (torch.nn.functional.pad(tensor, (0, 1)) for tensor in (codes, weight))
        for x, w in zip(codes.split(_INT32, 1), weight.split(_INT32, 1), strict=True):
            sums += torch._int_mm(x.contiguous(), w.T)
        return sums
    # Other devices' products of bytes ask for certain sizes; in float32 a kilobyte of them is exact as well.
    with torch.autocast(codes.device.type, enabled=False):
        for x, w in zip(codes.split(_FLOAT32, 1), weight.split(_FLOAT32, 1), strict=True):
            sums += (x.float() @ w.float().T).long()
    return sums
