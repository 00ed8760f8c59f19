"""The definition of GeGLU."""

import math

import torch
from torch import Tensor

from neural_layers.kernels.arguments import accumulation_dtype


def geglu_reference(gate: Tensor, up: Tensor, approximate: str = "tanh") -> Tensor:
    """gelu(gate) · up, with Φ the normal distribution: gelu(x) = x·Φ(x), or its tanh approximation."""
    x = gate.to(accumulation_dtype(gate))
    if approximate == "tanh":
        probability = 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    else:
        probability = 0.5 * (1 + torch.erf(x / math.sqrt(2)))
    return (x * probability * up).to(gate.dtype)
