"""The definition of affine 4-bit dequantization, row by row."""

import torch
from torch import Tensor

from neural_layers.kernels.int4 import QuantizedInt4


def dequantize_int4_reference(quantized: QuantizedInt4) -> Tensor:
    """w_oi = scale_og · (code_oi − zero_point_og)."""
    wide = torch.float64 if quantized.dtype == torch.float64 else torch.float32
    return weight_in(quantized, wide).to(quantized.dtype)


def weight_in(quantized: QuantizedInt4, dtype: torch.dtype) -> Tensor:
    """The weight with its products taken in `dtype`."""
    (outputs, inputs), block_size = quantized.shape, quantized.block_size
    weight = torch.zeros(outputs, inputs, dtype=dtype, device=quantized.packed.device)
    for o, row in enumerate(quantized.packed.tolist()):
        codes = [code for byte in row for code in (byte & 15, byte >> 4)]
        for i in range(inputs):
            g = i // block_size
            weight[o, i] = quantized.scale[o, g].to(dtype) * (codes[i] - int(quantized.zero_point[o, g]))
    return weight
