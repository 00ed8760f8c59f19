"""The definition of SwiGLU, and the check that gates share."""

import torch
from torch import Tensor

from neural_layers.kernels.arguments import FLOATS, accumulation_dtype, check_devices, check_floats


def check_gate(gate: Tensor, up: Tensor) -> None:
    """Raise where gate and up are not two floating tensors of one shape and dtype."""
    if gate.dtype not in FLOATS or gate.device != up.device:  # in one, because that is quicker
        check_floats(gate=gate)
        check_devices(gate=gate, up=up)
    if gate.shape != up.shape:
        raise ValueError(f"up has shape {tuple(up.shape)}; expected that of gate, {tuple(gate.shape)}")
    if gate.dtype != up.dtype:
        raise TypeError(f"up has dtype {up.dtype}; expected that of gate, {gate.dtype}")


def swiglu_reference(gate: Tensor, up: Tensor) -> Tensor:
    """gate · sigmoid(gate) · up."""
    wide = gate.to(accumulation_dtype(gate))
    return (wide * torch.sigmoid(wide) * up).to(gate.dtype)
