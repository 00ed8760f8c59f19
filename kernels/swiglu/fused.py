"""activation(gate) · up as torch sees it, for SwiGLU and GeGLU: one opaque op with its gradient, run by one of the
implementations below.

`backend` names the implementation and is the ops' last argument, so that all of them share what torch needs to know.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from neural_layers.kernels.c_library import autograd_alone, differentiable, unwatched
from neural_layers.kernels.swiglu import native
from neural_layers.kernels.triton_support import deferred

# name → (forward(gate, up, activation) → y;  backward(grad_y, gate, up, activation) → grad_gate, grad_up), where
# activation is "silu", "gelu_tanh" or "gelu_erf"
IMPLEMENTATIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "native": (native.forward, native.backward),
    "triton": (deferred("swiglu.triton_gate", "gate_forward"), deferred("swiglu.triton_gate", "gate_backward")),
}


def gated_activation(gate: Tensor, up: Tensor, activation: str, backend: str) -> Tensor:
    """activation(gate) · up, by the least of torch's machinery that the call needs."""
    if unwatched(gate, up):
        return IMPLEMENTATIONS[backend][0](gate, up, activation)
    run = _differentiable if autograd_alone(gate, up) else _forward
    return run(gate, up, activation, backend)


def swiglu_native(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up, in C."""
    return gated_activation(gate, up, "silu", "native")


def swiglu_triton(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) · up, in Triton."""
    return gated_activation(gate, up, "silu", "triton")


def _run(gate: Tensor, up: Tensor, activation: str, backend: str) -> Tensor:
    return IMPLEMENTATIONS[backend][0](gate, up, activation)


@torch.library.custom_op("neural_layers::gated_activation", mutates_args=())
def _forward(gate: Tensor, up: Tensor, activation: str, backend: str) -> Tensor:
    return _run(gate, up, activation, backend)


@_forward.register_fake
def _(gate: Tensor, up: Tensor, activation: str, backend: str) -> Tensor:
    return gate.new_empty(gate.shape)


@torch.library.custom_op("neural_layers::gated_activation_backward", mutates_args=())
def _backward(grad_y: Tensor, gate: Tensor, up: Tensor, activation: str, backend: str) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up."""
    return IMPLEMENTATIONS[backend][1](grad_y, gate, up, activation)


@_backward.register_fake
def _(grad_y: Tensor, gate: Tensor, up: Tensor, activation: str, backend: str) -> tuple[Tensor, Tensor]:
    return gate.new_empty(gate.shape), up.new_empty(up.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    gate, up, ctx.activation, ctx.backend = inputs
    ctx.save_for_backward(gate, up)


def _differentiate(ctx: Any, grad_y: Tensor) -> tuple[Tensor, Tensor, None, None]:
    gate, up = ctx.saved_tensors
    if unwatched(grad_y, gate, up):
        grads = IMPLEMENTATIONS[ctx.backend][1](grad_y, gate, up, ctx.activation)
    else:
        grads = _backward(grad_y, gate, up, ctx.activation, ctx.backend)
    return (*grads, None, None)


def _refuse(ctx: Any, *grads: Any) -> None:
    raise NotImplementedError("this backend of swiglu and geglu has no gradient of the gradient; use backend='torch'")


_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(_refuse)
_differentiable = differentiable(_run, _save, _differentiate)
