"""GeGLU in traceable torch."""

import torch.nn.functional
from torch import Tensor


def geglu_torch(gate: Tensor, up: Tensor, approximate: str = "tanh") -> Tensor:
    """gelu(gate) · up."""
    return torch.nn.functional.gelu(gate, approximate=approximate) * up
