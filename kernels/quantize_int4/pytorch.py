"""Affine 4-bit quantization in plain torch (backend `torch`): traceable, on any device."""

import torch
import torch.nn.functional as F
from torch import Tensor

from neural_layers.kernels.int4 import LARGEST, TINY, QuantizedInt4, groups_of


def quantize_int4_torch(weight: Tensor, block_size: int = 64) -> QuantizedInt4:
    """scale = (high − low) / 15, zero_point = round(−low / scale), code = round(w / scale) + zero_point."""
    outputs, inputs = weight.shape
    groups = groups_of(inputs, block_size)
    # A filled-up group has the same ends: zero is between them in any case.
    filled = F.pad(weight.detach().float(), (0, groups * block_size - inputs)).view(outputs, groups, block_size)
    low, high = filled.amin(dim=2).clamp(max=0), filled.amax(dim=2).clamp(min=0)
    scale = (high - low) / LARGEST
    finite = scale < torch.inf
    usable = finite & (scale >= TINY)
    step = torch.where(usable, scale, 1)
    zero = torch.where(usable, (-low / step).round(), 0)
    codes = ((filled / step.unsqueeze(2)).round() + zero.unsqueeze(2)).clamp(0, LARGEST)
    codes = torch.where(usable.unsqueeze(2), codes, 0).to(torch.uint8).view(outputs, groups * block_size)
    scale = torch.where(usable, scale, torch.where(finite, 0.0, torch.nan))
    packed = codes[:, ::2] | codes[:, 1::2] << 4
    return QuantizedInt4(packed, scale, zero.to(torch.uint8), block_size, (outputs, inputs), weight.dtype)
