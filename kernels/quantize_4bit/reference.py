"""The definition of 4-bit quantization, element by element.

All arithmetic is float32, whatever the weight's dtype: the rounding of the scaled value decides between two codes, so
that another precision would be another format.
"""

import torch
from torch import Tensor

from neural_layers.kernels.four_bit import ASCENDING, TINY, Quantized4bit, encode_absmax, midpoints


def quantize_4bit_reference(
    weight: Tensor, quant_type: str = "nf4", block_size: int = 64, double_quant: bool = False
) -> Quantized4bit:
    """absmax_b = max |w| over block b;  code_i = the nearest of the 16 codes to w_i / absmax_b."""
    flat, borders = weight.detach().reshape(-1).float(), midpoints(quant_type).tolist()
    scales, codes = [], []
    for block in flat.split(block_size) if flat.numel() else ():
        absmax = block.abs().max()
        if len(block) == block_size:
            scaled = block * (1 / absmax.clamp(min=TINY))
        else:
            # The short last block divides, and keeps the clamped absmax: the format as it is in the world.
            absmax = absmax.clamp(min=TINY)
            scaled = block / absmax
        scales.append(absmax)
        codes += [_code(value, borders, quant_type) for value in scaled.clamp(-1, 1).tolist()]
    if len(codes) % 2:
        codes.append(_code(0.0, borders, quant_type))
    packed = [high << 4 | low for high, low in zip(codes[::2], codes[1::2], strict=True)]
    packed_bytes = torch.tensor(packed, dtype=torch.uint8, device=weight.device).view(-1, 1)
    absmax = torch.stack(scales) if scales else flat.new_empty(0)
    shape = tuple(weight.shape)
    if not double_quant:
        return Quantized4bit(packed_bytes, absmax, quant_type, block_size, shape, weight.dtype)
    absmax_codes, nested_absmax, offset = encode_absmax(absmax)
    return Quantized4bit(packed_bytes, absmax_codes, quant_type, block_size, shape, weight.dtype, offset, nested_absmax)


def _code(value: float, borders: list[float], quant_type: str) -> int:
    """The code whose interval holds the value; NaN lies above all borders."""
    return ASCENDING[quant_type][sum(not value <= border for border in borders)]
