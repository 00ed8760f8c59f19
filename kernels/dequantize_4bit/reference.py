"""The definition of 4-bit dequantization, block by block."""

import torch
from torch import Tensor

from neural_layers.kernels.four_bit import CODES, DYNAMIC_MAP, NESTED_BLOCK, Quantized4bit


def dequantize_4bit_reference(quantized: Quantized4bit) -> Tensor:
    """w_i = value of code_i · absmax of its block."""
    wide = torch.float64 if quantized.dtype == torch.float64 else torch.float32
    return weight_in(quantized, wide).to(quantized.dtype)


def weight_in(quantized: Quantized4bit, dtype: torch.dtype) -> Tensor:
    """The weight with its products taken in `dtype`."""
    codes = [code for byte in quantized.packed.flatten().tolist() for code in (byte >> 4, byte & 15)]
    values = torch.tensor([CODES[quantized.quant_type][code] for code in codes], dtype=torch.float32).to(dtype)
    values = values[: quantized.numel].to(quantized.packed.device)
    blocks = [
        block * _absmax(quantized, index).to(dtype)
        for index, block in enumerate(values.split(quantized.block_size) if len(values) else ())
    ]
    return (torch.cat(blocks) if blocks else values).view(quantized.shape)


def _absmax(quantized: Quantized4bit, block: int) -> Tensor:
    """The absmax of a block in float32."""
    if quantized.nested_absmax is None or quantized.offset is None:
        return quantized.absmax[block]
    value = torch.tensor(DYNAMIC_MAP[int(quantized.absmax[block])], dtype=torch.float32)
    return value.to(quantized.absmax.device) * quantized.nested_absmax[block // NESTED_BLOCK] + quantized.offset
