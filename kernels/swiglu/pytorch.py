"""SwiGLU in traceable torch."""

import torch.nn.functional
from torch import Tensor


def swiglu_torch(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up."""
    return torch.nn.functional.silu(gate) * up
