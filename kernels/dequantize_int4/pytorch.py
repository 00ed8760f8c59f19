"""Affine 4-bit dequantization in plain torch (backend `torch`): traceable, on any device."""

import torch
from torch import Tensor

from neural_layers.kernels.int4 import QuantizedInt4


def dequantize_int4_torch(quantized: QuantizedInt4) -> Tensor:
    """w_oi = scale_og · (code_oi − zero_point_og)."""
    wide = torch.float64 if quantized.dtype == torch.float64 else torch.float32
    return weight_in(quantized, wide).to(quantized.dtype)


def weight_in(quantized: QuantizedInt4, dtype: torch.dtype) -> Tensor:
    """The weight with its products taken in `dtype`."""
    inputs = quantized.shape[1]
    return values_of(quantized.packed, quantized.scale, quantized.zero_point, quantized.block_size, dtype)[:, :inputs]


def values_of(packed: Tensor, scale: Tensor, zero_point: Tensor, block_size: int, dtype: torch.dtype) -> Tensor:
    """The weights of some rows, filled up to whole groups: (rows, groups · block_size)."""
    rows, groups = scale.shape
    # Differences of codes are small integers, which every dtype holds.
    codes = torch.stack([packed & 15, packed >> 4], dim=2).view(rows, groups, block_size).to(dtype)
    centred = codes - zero_point.to(dtype).unsqueeze(2)
    return (centred * scale.to(dtype).unsqueeze(2)).view(rows, groups * block_size)
