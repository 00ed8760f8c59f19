"""The rotary embedding in traceable torch."""

import torch
from torch import Tensor

from neural_layers.kernels.arguments import accumulation_dtype


def apply_rotary_torch(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Both halves at once."""
    first, second = x.to(accumulation_dtype(x, cos, sin)).chunk(2, dim=-1)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1).to(x.dtype)
