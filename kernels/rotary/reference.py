"""The definition of the rotary embedding, pair by pair."""

import torch
from torch import Tensor

from neural_layers.kernels.arguments import accumulation_dtype


def apply_rotary_reference(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """The rotation matrix of each pair, written out."""
    wide = x.to(accumulation_dtype(x, cos, sin))
    half = x.shape[-1] // 2
    out = torch.empty_like(wide)
    for i in range(half):
        c, s = cos[..., i].unsqueeze(-1), sin[..., i].unsqueeze(-1)
        first, second = wide[..., i], wide[..., i + half]
        out[..., i] = first * c - second * s
        out[..., i + half] = second * c + first * s
    return out.to(x.dtype)
