"""The selective scan as torch sees it: one opaque op with its gradient, run by one of the implementations below.

`backend` names the implementation and is the ops' last argument, so that all of them share what torch needs to know:
the shapes (fake) and the derivative. All keep the state before each chunk of steps for the backward pass.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from neural_layers.kernels.arguments import accumulation_dtype
from neural_layers.kernels.c_library import unwatched
from neural_layers.kernels.selective_scan import native, pytorch
from neural_layers.kernels.selective_scan.chunks import CHUNK
from neural_layers.kernels.triton_support import deferred


class Implementation(NamedTuple):
    """Functions with the arguments and results of the two ops below, less `backend`."""

    forward: Callable[..., tuple[Tensor, Tensor, Tensor]]  # takes `keep_borders` too, where that is optional
    backward: Callable[..., list[Tensor]]
    chunk: int  # steps between two states that are kept for the backward pass
    states_last: bool  # those are (J + 1, B, E, N), not (J + 1, B, N, E)
    optional_borders: bool  # they can be left out


IMPLEMENTATIONS = {
    "native": Implementation(native.forward, native.backward, CHUNK, states_last=False, optional_borders=True),
    "triton": Implementation(
        deferred("selective_scan.triton_forward", "forward"),
        deferred("selective_scan.triton_backward", "backward"),
        chunk=64,
        states_last=True,
        optional_borders=True,
    ),
    "torch": Implementation(pytorch.forward, pytorch.backward, CHUNK, states_last=False, optional_borders=False),
}


def selective_scan_fused(
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
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    seq_idx: Tensor | None = None,
    backend: str,
) -> Tensor | tuple[Tensor, Tensor]:
    """h_t = exp(Δ_t A) h_{t−1} + Δ_t B_t u_t;  y_t = (C_t·h_t + D u_t) · silu(z_t), by the named implementation."""
    floats = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    if IMPLEMENTATIONS[backend].optional_borders and unwatched(*floats):
        y, final_state, _ = IMPLEMENTATIONS[backend].forward(*floats, seq_idx, delta_softplus, False)
    else:
        y, final_state, _ = _forward(*floats, seq_idx, delta_softplus, backend)
    return (y, final_state) if return_final_state else y


@torch.library.custom_op("neural_layers::selective_scan", mutates_args=())
def _forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    delta_softplus: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, T, E), the final state (B, E, N) and the states at the borders of the chunks: (J + 1, B, N, E), or
    (J + 1, B, E, N) for an implementation with `states_last`."""
    run = IMPLEMENTATIONS[backend].forward
    return run(u, delta, A, B, C, D, z, delta_bias, initial_state, seq_idx, delta_softplus)


@_forward.register_fake
def _(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    delta_softplus: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, width = u.shape
    wide = u.new_empty(0, dtype=accumulation_dtype(u, delta, A, B, C, D, z, delta_bias, initial_state))
    implementation, states = IMPLEMENTATIONS[backend], A.shape[1]
    chunks = (length + implementation.chunk - 1) // implementation.chunk
    kept = (width, states) if implementation.states_last else (states, width)
    return (
        u.new_empty(u.shape),
        wide.new_empty(batch, width, states),
        wide.new_empty(chunks + 1, batch, *kept),
    )


@torch.library.custom_op("neural_layers::selective_scan_backward", mutates_args=())
def _backward(
    grad_y: Tensor,
    grad_final_state: Tensor | None,
    borders: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    delta_softplus: bool,
    backend: str,
) -> list[Tensor]:
    """The gradients of u, delta, A, B, C, and of D, z, delta_bias, initial_state where given."""
    run = IMPLEMENTATIONS[backend].backward
    return run(
        grad_y, grad_final_state, borders, u, delta, A, B, C, D, z, delta_bias, initial_state, seq_idx, delta_softplus
    )


@_backward.register_fake
def _(
    grad_y: Tensor,
    grad_final_state: Tensor | None,
    borders: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    delta_softplus: bool,
    backend: str,
) -> list[Tensor]:
    given = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    return [tensor.new_empty(tensor.shape) for tensor in given if tensor is not None]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.delta_softplus, ctx.backend = inputs
    ctx.save_for_backward(output[2], *tensors)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad_y: Tensor | None, grad_final_state: Tensor | None, _: Any) -> tuple[Any, ...]:
    borders, *tensors = ctx.saved_tensors
    if grad_y is None:
        grad_y = torch.zeros_like(tensors[0])
    gradients = iter(_backward(grad_y, grad_final_state, borders, *tensors, ctx.delta_softplus, ctx.backend))
    *floats, _seq_idx = tensors
    return (*(None if tensor is None else next(gradients) for tensor in floats), None, None, None)


def _refuse(ctx: Any, *grads: Any) -> None:
    raise NotImplementedError("this backend of selective_scan has no gradient of the gradient; use backend='reference'")


_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(_refuse)
