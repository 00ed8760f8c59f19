"""RMSNorm as torch sees it: one opaque op with its gradient, run by one of the implementations below.

`backend` names the implementation and is the ops' last argument, so that all of them share what torch needs to know:
the shapes (fake) and the derivative.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from neural_layers.kernels.arguments import accumulation_dtype
from neural_layers.kernels.c_library import autograd_alone, differentiable, unwatched
from neural_layers.kernels.rms_norm import native
from neural_layers.kernels.triton_support import deferred

# name → (forward(x, weight, eps) → y, scale;  backward(grad_y, x, weight, scale) → grad_x, grad_weight)
IMPLEMENTATIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "native": (native.forward, native.backward),
    "triton": (deferred("rms_norm.triton_forward", "forward"), deferred("rms_norm.triton_backward", "backward")),
}


def rms_norm_native(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight, in C."""
    return _run(x, weight, eps, "native")


def rms_norm_triton(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight, in Triton."""
    return _run(x, weight, eps, "triton")


def _run(x: Tensor, weight: Tensor, eps: float, backend: str) -> Tensor:
    if unwatched(x, weight):
        return IMPLEMENTATIONS[backend][0](x, weight, eps)[0]
    run = _differentiable if autograd_alone(x, weight) else _forward
    return run(x, weight, eps, backend)[0]


def _choose(x: Tensor, weight: Tensor, eps: float, backend: str) -> tuple[Tensor, Tensor]:
    return IMPLEMENTATIONS[backend][0](x, weight, eps)


@torch.library.custom_op("neural_layers::rms_norm", mutates_args=())
def _forward(x: Tensor, weight: Tensor, eps: float, backend: str) -> tuple[Tensor, Tensor]:
    """y, and the scale 1 / sqrt(mean(x²) + eps) of each row."""
    return _choose(x, weight, eps, backend)


@_forward.register_fake
def _(x: Tensor, weight: Tensor, eps: float, backend: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=accumulation_dtype(x, weight))


@torch.library.custom_op("neural_layers::rms_norm_backward", mutates_args=())
def _backward(grad_y: Tensor, x: Tensor, weight: Tensor, scale: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    """The gradients of x and of the weight."""
    return IMPLEMENTATIONS[backend][1](grad_y, x, weight, scale)


@_backward.register_fake
def _(grad_y: Tensor, x: Tensor, weight: Tensor, scale: Tensor, backend: str) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, ctx.backend = inputs
    ctx.save_for_backward(x, weight, output[1])
    ctx.mark_non_differentiable(output[1])


def _differentiate(ctx: Any, grad_y: Tensor, _: Any) -> tuple[Tensor, Tensor, None, None]:
    tensors = ctx.saved_tensors
    if unwatched(grad_y, *tensors):
        return (*IMPLEMENTATIONS[ctx.backend][1](grad_y, *tensors), None, None)
    return (*_backward(grad_y, *tensors, ctx.backend), None, None)


def _refuse(ctx: Any, *grads: Any) -> None:
    raise NotImplementedError("this backend of rms_norm has no gradient of the gradient; use backend='torch'")


_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(_refuse)
_differentiable = differentiable(_choose, _save, _differentiate)
