"""The causal convolution as torch sees it: one opaque op with its gradient, run by one of the implementations below.

`backend` names the implementation and is the ops' last argument, so that all of them share what torch needs to know.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from neural_layers.kernels.c_library import autograd_alone, differentiable, unwatched
from neural_layers.kernels.causal_conv1d import native
from neural_layers.kernels.triton_support import deferred

# name → (forward(x, weight, bias, initial_state, seq_idx, activation, return_final_state) → y, final_state;
#         backward(grad_y, grad_final_state, x, weight, bias, initial_state, seq_idx, activation) → the gradients of x
#         and weight, and of bias and initial_state where given). A final state that is not wanted is
#         None, or (B, 0, E).
IMPLEMENTATIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "native": (native.forward, native.backward),
    "triton": (
        deferred("causal_conv1d.triton_forward", "forward"),
        deferred("causal_conv1d.triton_backward", "backward"),
    ),
}


def causal_conv1d_native(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    seq_idx: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """y[t] = Σ_w weight[w]·x[t − (W−1) + w] + bias over the inputs of t's document, in C."""
    y, final_state = _run(x, weight, bias, initial_state, seq_idx, activation, return_final_state, "native")
    return (y, final_state) if return_final_state else y


def causal_conv1d_triton(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    seq_idx: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """y[t] = Σ_w weight[w]·x[t − (W−1) + w] + bias over the inputs of t's document, in Triton."""
    y, final_state = _run(x, weight, bias, initial_state, seq_idx, activation, return_final_state, "triton")
    return (y, final_state) if return_final_state else y


def _run(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    activation: str | None,
    return_final_state: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    arguments = x, weight, bias, initial_state, seq_idx, activation, return_final_state
    if unwatched(x, weight, bias, initial_state, seq_idx):
        return IMPLEMENTATIONS[backend][0](*arguments)
    run = _differentiable if autograd_alone(x, weight, bias, initial_state, seq_idx) else _forward
    return run(*arguments, backend)


def _choose(*inputs: Any) -> tuple[Tensor, Tensor | None]:
    return IMPLEMENTATIONS[inputs[-1]][0](*inputs[:-1])


@torch.library.custom_op("neural_layers::causal_conv1d", mutates_args=())
def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    activation: str | None,
    return_final_state: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """y (B, T, E) and the final state (B, W − 1, E), or (B, 0, E) where it is not wanted."""
    forward = IMPLEMENTATIONS[backend][0]
    y, final_state = forward(x, weight, bias, initial_state, seq_idx, activation, return_final_state)
    return y, x.new_empty(x.shape[0], 0, x.shape[2]) if final_state is None else final_state


@_forward.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    activation: str | None,
    return_final_state: bool,
    backend: str,
) -> tuple[Tensor, Tensor]:
    batch, _, width = x.shape
    dtype = x.dtype if initial_state is None else torch.promote_types(x.dtype, initial_state.dtype)
    size = weight.shape[1] - 1 if return_final_state else 0
    return x.new_empty(x.shape), x.new_empty(batch, size, width, dtype=dtype)


@torch.library.custom_op("neural_layers::causal_conv1d_backward", mutates_args=())
def _backward(
    grad_y: Tensor,
    grad_final_state: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    activation: str | None,
    backend: str,
) -> list[Tensor]:
    """The gradients of x and weight, and of bias and initial_state where given."""
    backward = IMPLEMENTATIONS[backend][1]
    return backward(grad_y, grad_final_state, x, weight, bias, initial_state, seq_idx, activation)


@_backward.register_fake
def _(
    grad_y: Tensor,
    grad_final_state: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    activation: str | None,
    backend: str,
) -> list[Tensor]:
    given = x, weight, bias, initial_state
    return [tensor.new_empty(tensor.shape) for tensor in given if tensor is not None]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.activation, _, ctx.backend = inputs
    ctx.save_for_backward(*tensors)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad_y: Tensor | None, grad_final_state: Tensor | None) -> tuple[Any, ...]:
    *floats, seq_idx = ctx.saved_tensors
    if grad_y is None:
        grad_y = torch.zeros_like(floats[0])
    if unwatched(grad_y, grad_final_state, *floats, seq_idx):
        backward = IMPLEMENTATIONS[ctx.backend][1]
        gradients = iter(backward(grad_y, grad_final_state, *floats, seq_idx, ctx.activation))
    else:
        gradients = iter(_backward(grad_y, grad_final_state, *floats, seq_idx, ctx.activation, ctx.backend))
    return (*(None if tensor is None else next(gradients) for tensor in floats), None, None, None, None)


def _refuse(ctx: Any, *grads: Any) -> None:
    raise NotImplementedError("this backend of causal_conv1d has no gradient of the gradient; use backend='torch'")


_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(_refuse)
_differentiable = differentiable(_choose, _save, _differentiate)
