"""The Mamba-2 scan as torch sees it: one opaque op with its gradient, run by one of the implementations below.

`backend` names the implementation and is the ops' last argument, so that all of them share what torch needs to know:
the shapes (fake) and the derivative.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from neural_layers.kernels.arguments import accumulation_dtype
from neural_layers.kernels.c_library import unwatched
from neural_layers.kernels.ssd_scan import pytorch
from neural_layers.kernels.triton_support import deferred


class Implementation(NamedTuple):
    """Functions with the arguments and results of the two ops below, less `backend`. Neither modifies its arguments."""

    forward: Callable[..., tuple[Tensor, Tensor, Tensor]]
    backward: Callable[..., list[Tensor]]
    stride: int  # a state is kept for every so many chunks


IMPLEMENTATIONS = {
    "triton": Implementation(
        deferred("ssd_scan.triton_forward", "forward"), deferred("ssd_scan.triton_backward", "backward"), stride=1
    ),
    "torch": Implementation(pytorch.forward, pytorch.backward, pytorch.STRIDE),
}


def ssd_scan_fused(
    backend: str,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    seq_idx: Tensor | None = None,
    chunk_size: int = 64,
) -> Tensor | tuple[Tensor, Tensor]:
    """h_t = exp(Δ_t A) h_{t−1} + Δ_t x_t B_tᵀ;  y_t = (h_t C_t + D x_t) · silu(z_t)."""
    tensors = (x, dt, A, B, C, D, z, dt_bias, initial_state, seq_idx)
    if unwatched(*tensors):
        with torch.autocast(x.device.type, enabled=False):
            y, final_state, _ = IMPLEMENTATIONS[backend].forward(*tensors, dt_softplus, chunk_size, False)
    else:
        y, final_state, _ = _forward(*tensors, dt_softplus, chunk_size, torch.is_grad_enabled(), backend)
    return (y, final_state) if return_final_state else y


@torch.library.custom_op("neural_layers::ssd_scan", mutates_args=())
def _forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    dt_softplus: bool,
    chunk_size: int,
    keep_states: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, T, H, P) in the dtype of x, and in the accumulation dtype the final state (B, H, P, N) and, for the
    backward pass, the states (J + 1, B, H, P, N) before every `stride`-th chunk and after the last one; or
    (0, B, H, P, N) without `keep_states`."""
    # Inside autocast the op would otherwise multiply matrices in half precision, here and in the backward pass.
    with torch.autocast(x.device.type, enabled=False):
        return IMPLEMENTATIONS[backend].forward(
            x, dt, A, B, C, D, z, dt_bias, initial_state, seq_idx, dt_softplus, chunk_size, keep_states
        )


@_forward.register_fake
def _(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    dt_softplus: bool,
    chunk_size: int,
    keep_states: bool,
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    batch, length, heads, width = x.shape
    dtype = accumulation_dtype(x, dt, A, B, C, D, z, dt_bias, initial_state)
    final_state = x.new_empty(batch, heads, width, B.shape[3], dtype=dtype)
    # J + 1, so that there are two or more however short the sequence: torch.export then does not take the one chunk of
    # its example for a constant.
    tokens = chunk_size * IMPLEMENTATIONS[backend].stride
    kept = (length + tokens - 1) // tokens + 1 if keep_states else 0
    return x.new_empty(x.shape), final_state, final_state.new_empty(kept, *final_state.shape)


@torch.library.custom_op("neural_layers::ssd_scan_backward", mutates_args=())
def _backward(
    grad_y: Tensor,
    grad_final_state: Tensor | None,
    states: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    dt_softplus: bool,
    chunk_size: int,
    backend: str,
) -> list[Tensor]:
    """The gradients of x, dt, A, B, C, and of D, z, dt_bias, initial_state where given."""
    with torch.autocast(x.device.type, enabled=False):
        return IMPLEMENTATIONS[backend].backward(
            grad_y, grad_final_state, states, x, dt, A, B, C, D, z, dt_bias, initial_state, seq_idx, dt_softplus,
            chunk_size,
        )  # fmt: skip


@_backward.register_fake
def _(
    grad_y: Tensor,
    grad_final_state: Tensor | None,
    states: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    dt_softplus: bool,
    chunk_size: int,
    backend: str,
) -> list[Tensor]:
    given = (x, dt, A, B, C, D, z, dt_bias, initial_state)
    return [tensor.new_empty(tensor.shape) for tensor in given if tensor is not None]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    *tensors, ctx.dt_softplus, ctx.chunk_size, _keep_states, ctx.backend = inputs
    ctx.save_for_backward(output[2], *tensors)
    ctx.mark_non_differentiable(output[2])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad_y: Tensor | None, grad_final_state: Tensor | None, _: Any) -> tuple[Any, ...]:
    states, *tensors = ctx.saved_tensors
    if grad_y is None:
        grad_y = torch.zeros_like(tensors[0])
    gradients = iter(
        _backward(grad_y, grad_final_state, states, *tensors, ctx.dt_softplus, ctx.chunk_size, ctx.backend)
    )
    *floats, _seq_idx = tensors
    return (*(None if tensor is None else next(gradients) for tensor in floats), *[None] * 5)


def _refuse(ctx: Any, *grads: Any) -> None:
    raise NotImplementedError("this backend of ssd_scan has no gradient of the gradient; use backend='reference'")


_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(_refuse)
