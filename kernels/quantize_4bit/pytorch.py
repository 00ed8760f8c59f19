"""4-bit quantization in plain torch (backend `torch`): traceable, on any device."""

import torch
import torch.nn.functional as F
from torch import Tensor

from neural_layers.kernels.four_bit import ASCENDING, TINY, Quantized4bit, encode_absmax, midpoints


def quantize_4bit_torch(
    weight: Tensor, quant_type: str = "nf4", block_size: int = 64, double_quant: bool = False
) -> Quantized4bit:
    """absmax_b = max |w| over block b;  code_i = the nearest of the 16 codes to w_i / absmax_b."""
    packed, absmax = _quantize(weight.detach(), quant_type, block_size)
    return as_record(weight, packed, absmax, quant_type, block_size, double_quant)


def as_record(
    weight: Tensor, packed: Tensor, absmax: Tensor, quant_type: str, block_size: int, double_quant: bool
) -> Quantized4bit:
    """The record of the weight, its absmax quantized in turn where `double_quant`."""
    offset = nested_absmax = None
    if double_quant:
        absmax, nested_absmax, offset = encode_absmax(absmax)
    return Quantized4bit(
        packed, absmax, quant_type, block_size, tuple(weight.shape), weight.dtype, offset, nested_absmax
    )


def _quantize(weight: Tensor, quant_type: str, block_size: int) -> tuple[Tensor, Tensor]:
    """packed (bytes, 1) uint8 and absmax (blocks,) float32."""
    flat = weight.reshape(-1).float()
    whole = flat.numel() // block_size * block_size
    blocks, rest = flat[:whole].view(-1, block_size), flat[whole:]
    absmax = blocks.abs().amax(dim=1)
    scaled = (blocks * (1 / absmax.clamp(min=TINY))[:, None]).view(-1)
    if rest.numel():
        # The short last block divides, and keeps the clamped absmax: the format as it is in the world.
        last = rest.abs().amax(dim=0, keepdim=True).clamp(min=TINY)
        absmax, scaled = torch.cat([absmax, last]), torch.cat([scaled, rest / last])
    scaled = F.pad(scaled.clamp(-1, 1), (0, flat.numel() % 2))
    codes = torch.bucketize(scaled, midpoints(quant_type).to(weight.device), out_int32=True)
    if quant_type != "nf4":
        codes = torch.tensor(ASCENDING[quant_type], device=weight.device)[codes]
    codes = codes.to(torch.uint8)
    return (codes[::2] << 4 | codes[1::2])[:, None], absmax
