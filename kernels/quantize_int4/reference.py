"""The definition of affine 4-bit quantization, group by group.

All arithmetic is float32, whatever the weight's dtype: the rounding decides between two codes, so that another
precision would be another format.
"""

import torch
from torch import Tensor

from neural_layers.kernels.int4 import LARGEST, TINY, QuantizedInt4, groups_of


def quantize_int4_reference(weight: Tensor, block_size: int = 64) -> QuantizedInt4:
    """scale = (high − low) / 15, zero_point = round(−low / scale), code = round(w / scale) + zero_point."""
    outputs, inputs = weight.shape
    groups = groups_of(inputs, block_size)
    scale, zero_point = torch.zeros(outputs, groups), torch.zeros(outputs, groups, dtype=torch.uint8)
    codes = torch.zeros(outputs, groups * block_size, dtype=torch.uint8)
    wide = weight.detach().float().cpu()
    for o in range(outputs):
        for g in range(groups):
            here = slice(g * block_size, (g + 1) * block_size)
            found, zero, scale[o, g] = _quantize_group(wide[o, here])
            zero_point[o, g], codes[o, here] = zero, zero
            codes[o, here][: len(found)] = found
    packed = codes[:, ::2] | codes[:, 1::2] << 4
    packed, scale, zero_point = (tensor.to(weight.device) for tensor in (packed, scale, zero_point))
    return QuantizedInt4(packed, scale, zero_point, block_size, (outputs, inputs), weight.dtype)


def _quantize_group(group: Tensor) -> tuple[Tensor, int, Tensor]:
    """The codes, the zero point and the scale of some neighbouring weights."""
    low, high = group.min().clamp(max=0), group.max().clamp(min=0)
    scale = (high - low) / LARGEST
    if not scale < torch.inf:
        return torch.zeros_like(group, dtype=torch.uint8), 0, torch.tensor(torch.nan)
    if scale < TINY:
        return torch.zeros_like(group, dtype=torch.uint8), 0, torch.tensor(0.0)
    zero = (-low / scale).round()
    return ((group / scale).round() + zero).clamp(0, LARGEST).to(torch.uint8), int(zero), scale
