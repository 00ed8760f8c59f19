"""GeGLU by the op that it shares with SwiGLU."""

from torch import Tensor

from neural_layers.kernels.swiglu.fused import gated_activation

ACTIVATION = {"tanh": "gelu_tanh", "none": "gelu_erf"}


def geglu_native(gate: Tensor, up: Tensor, approximate: str = "tanh") -> Tensor:
    """gelu(gate) · up, in C."""
    return gated_activation(gate, up, ACTIVATION[approximate], "native")


def geglu_triton(gate: Tensor, up: Tensor, approximate: str = "tanh") -> Tensor:
    """gelu(gate) · up, in Triton."""
    return gated_activation(gate, up, ACTIVATION[approximate], "triton")
