"""RMSNorm as torch sees it: one opaque op with its gradient, run by one of the implementations below.

`backend` names the implementation and is the ops' last argument, so that all of them share what torch needs to know:
the shapes (fake) and the derivative.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from neural_layers.kernels.arguments import accumulation_dtype
from neural_layers.kernels.c_library import unwatched
from neural_layers.kernels.rms_norm import native

# name → (forward(x, weight, eps) → y, scale;  backward(grad_y, x, weight, scale) → grad_x, grad_weight)
IMPLEMENTATIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "native": (native.forward, native.backward),
}


def rms_norm_native(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight, in C."""
    if unwatched(x, weight):
        return native.forward(x, weight, eps)[0]
    return _forward(x, weight, eps, "native")[0]


@torch.library.custom_op("neural_layers::rms_norm", mutates_args=())
def _forward(x: Tensor, weight: Tensor, eps: float, backend: str) -> tuple[Tensor, Tensor]:
    """y, and the scale 1 / sqrt(mean(x²) + eps) of each row."""
    return IMPLEMENTATIONS[backend][0](x, weight, eps)


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
    return (*_backward(grad_y, *ctx.saved_tensors, ctx.backend), None, None)


def _refuse(ctx: Any, *grads: Any) -> None:
    raise NotImplementedError("this backend of rms_norm has no gradient of the gradient; use backend='torch'")


_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(_refuse)
