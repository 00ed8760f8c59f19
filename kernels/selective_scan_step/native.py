"""One step of the selective scan in C (backend `native`), for decoding: native.c."""

import torch
from torch import Tensor

from neural_layers.kernels import c_library
from neural_layers.kernels.arguments import accumulation_dtype


def obstacle(state: Tensor, *tensors: Tensor, delta_softplus: bool, **optional: Tensor | None) -> str | None:
    """Why the C step cannot run, or None."""
    everything = (state, *tensors, *optional.values())
    reason = c_library.obstacle(state)
    if reason is None and not c_library.unwatched(*everything):
        return "the C step is for decoding: it has no gradient and cannot be traced"
    return reason


def selective_scan_step_native(
    state: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
) -> tuple[Tensor, Tensor]:
    """h = exp(Δ A) state + Δ B u;  y = (C·h + D u) · silu(z)."""
    dtype = accumulation_dtype(state, u, delta, A, B, C, D, z, delta_bias)
    given = (state, u, delta, A, B, C, D, z, delta_bias)
    wide = [
        tensor
        if tensor is None or (tensor.dtype is dtype and tensor.is_contiguous())
        else tensor.to(dtype).contiguous()
        for tensor in given
    ]
    rows, width, states = state.shape
    y, new_state = u.new_empty(u.shape, dtype=dtype), state.new_empty(state.shape, dtype=dtype)
    run = c_library.function("selective_scan_step", dtype)
    run(*wide, y, new_state, rows, width, states, delta_softplus, torch.get_num_threads())
    return y.to(u.dtype), new_state
