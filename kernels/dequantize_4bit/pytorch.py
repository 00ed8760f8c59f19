"""4-bit dequantization in plain torch (backend `torch`): traceable, on any device."""

import torch
import torch.nn.functional as F
from torch import Tensor

from neural_layers.kernels.four_bit import CODES, DYNAMIC_MAP, NESTED_BLOCK, Quantized4bit, decode_absmax


def dequantize_4bit_torch(quantized: Quantized4bit) -> Tensor:
    """w_i = value of code_i · absmax of its block."""
    wide = torch.float64 if quantized.dtype == torch.float64 else torch.float32
    return weight_in(quantized, wide).to(quantized.dtype)


def weight_in(quantized: Quantized4bit, dtype: torch.dtype) -> Tensor:
    """The weight with its products taken in `dtype`."""
    count, block_size = quantized.numel, quantized.block_size
    values = torch.tensor(CODES[quantized.quant_type], dtype=torch.float32, device=quantized.packed.device).to(dtype)
    # A byte looks up both of its values at once.
    pairs = torch.stack([values.repeat_interleave(16), values.repeat(16)], dim=1)
    flat = F.embedding(quantized.packed.view(-1).int(), pairs).view(-1)
    absmax = decode_absmax(quantized).to(dtype)
    blocks = absmax.shape[0]
    if flat.numel() != blocks * block_size:
        flat = F.pad(flat, (0, blocks * block_size - flat.numel()))
    return (flat.view(blocks, block_size) * absmax[:, None]).view(-1)[:count].view(quantized.shape)


def rows_in(quantized: Quantized4bit, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows `ids` (N,) of a weight (rows, width), with their products taken in `dtype`: (N, width)."""
    rows, width = quantized.shape
    if ids.is_cpu and ids.numel() and not torch.compiler.is_compiling():
        low, high = int(ids.min()), int(ids.max())
        if low < 0 or high >= rows:
            raise IndexError(f"ids run from {low} to {high}; expected 0 to {rows - 1}")
    element = ids.long().unsqueeze(1) * width + torch.arange(width, device=ids.device)
    packed = quantized.packed.view(-1)[element >> 1]
    codes = torch.where(element & 1 == 0, packed >> 4, packed & 15).int()
    values = torch.tensor(CODES[quantized.quant_type], dtype=torch.float32, device=packed.device).to(dtype)
    return values[codes] * absmax_of(quantized, element // quantized.block_size).to(dtype)


def absmax_of(quantized: Quantized4bit, blocks: Tensor) -> Tensor:
    """The absmax of some blocks in float32, decoded where they are double-quantized."""
    found = quantized.absmax[blocks]
    if quantized.offset is None or quantized.nested_absmax is None:
        return found
    values = torch.tensor(DYNAMIC_MAP, dtype=torch.float32, device=found.device)
    return values[found.int()] * quantized.nested_absmax[blocks // NESTED_BLOCK] + quantized.offset
