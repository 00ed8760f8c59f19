"""4-bit dequantization in plain torch (backend `torch`): traceable, on any device."""

import torch
import torch.nn.functional as F
from torch import Tensor

from neural_layers.kernels.four_bit import CODES, Quantized4bit, decode_absmax


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
