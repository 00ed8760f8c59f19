"""The rotary embedding as torch sees it: one opaque op with its gradient, run by one of the implementations below.

The rotation is linear in x: its gradient is the rotation back, the same op with `inverse` turned over, differentiable
to any order and without x. cos and sin are tables as a rule; where they do want gradients, a second op gives them.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from neural_layers.kernels.c_library import unwatched
from neural_layers.kernels.triton_support import deferred

# name → (rotate(x, cos, sin, inverse) → y;  angle_gradients(grad_y, x, cos, sin, inverse) → grad_cos, grad_sin)
IMPLEMENTATIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "triton": (deferred("rotary.triton_kernels", "rotate"), deferred("rotary.triton_kernels", "angle_gradients")),
}


def apply_rotary_triton(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Each pair turned by its angle, in Triton."""
    return _run(x, cos, sin, "triton")


def _run(x: Tensor, cos: Tensor, sin: Tensor, backend: str) -> Tensor:
    if unwatched(x, cos, sin):
        return IMPLEMENTATIONS[backend][0](x, cos, sin, False)
    return _rotate(x, cos, sin, False, backend)


@torch.library.custom_op("neural_layers::apply_rotary", mutates_args=())
def _rotate(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool, backend: str) -> Tensor:
    return IMPLEMENTATIONS[backend][0](x, cos, sin, inverse)


@_rotate.register_fake
def _(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool, backend: str) -> Tensor:
    return x.new_empty(x.shape)


@torch.library.custom_op("neural_layers::apply_rotary_angle_gradients", mutates_args=())
def _angle_gradients(
    grad_y: Tensor, x: Tensor, cos: Tensor, sin: Tensor, inverse: bool, backend: str
) -> tuple[Tensor, Tensor]:
    """The gradients of cos and sin."""
    return IMPLEMENTATIONS[backend][1](grad_y, x, cos, sin, inverse)


@_angle_gradients.register_fake
def _(grad_y: Tensor, x: Tensor, cos: Tensor, sin: Tensor, inverse: bool, backend: str) -> tuple[Tensor, Tensor]:
    return cos.new_empty(cos.shape), sin.new_empty(sin.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, cos, sin, ctx.inverse, ctx.backend = inputs
    wants_angles = any(ctx.needs_input_grad[1:3])
    ctx.save_for_backward(x if wants_angles else None, cos, sin)


def _differentiate(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    x, cos, sin = ctx.saved_tensors
    grad_x = grad_cos = grad_sin = None
    if ctx.needs_input_grad[0]:
        grad_x = _rotate(grad_y, cos, sin, not ctx.inverse, ctx.backend)
    if x is not None:
        grad_cos, grad_sin = _angle_gradients(grad_y, x, cos, sin, ctx.inverse, ctx.backend)
    return grad_x, grad_cos, grad_sin, None, None


def _refuse(ctx: Any, *grads: Any) -> None:
    raise NotImplementedError(
        "this backend of apply_rotary has no gradient of the gradient of cos and sin; use backend='torch'"
    )


_rotate.register_autograd(_differentiate, setup_context=_save)
_angle_gradients.register_autograd(_refuse)
