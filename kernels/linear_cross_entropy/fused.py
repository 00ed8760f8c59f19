"""linear_cross_entropy as torch sees it: one opaque op that makes loss and gradients, whichever implementation runs it.

An implementation takes exactly the arguments of `_forward` less `backend`, and returns the loss and the gradients of
hidden and weight, all in the accumulation dtype; a gradient that is not wanted has no elements.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from neural_layers.kernels.arguments import accumulation_dtype
from neural_layers.kernels.chunked_loss import keep_gradients, take_gradients, wanted
from neural_layers.kernels.linear_cross_entropy import native, pytorch
from neural_layers.kernels.triton_support import deferred

IMPLEMENTATIONS: dict[str, Callable[..., tuple[Tensor, list[Tensor]]]] = {
    "native": native.run,
    "triton": deferred("linear_cross_entropy.triton_rows", "run"),
    "torch": pytorch.run,
}


def linear_cross_entropy_fused(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    chunk_size: int | None = None,
    backend: str,
) -> Tensor:
    """−mean of log softmax(h Wᵀ)[target], smoothed, in chunks of tokens."""
    options = (ignore_index, label_smoothing, chunk_size, wanted(hidden, weight), backend)
    return _forward(hidden, weight, target, *options)[0]


@torch.library.custom_op("neural_layers::linear_cross_entropy", mutates_args=())
def _forward(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    chunk_size: int | None,
    wants: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """The loss, and the gradients of hidden and weight where wanted."""
    run = IMPLEMENTATIONS[backend]
    loss, (grad_hidden, grad_weight) = run(hidden, weight, target, ignore_index, label_smoothing, chunk_size, wants)
    return loss, grad_hidden, grad_weight


@_forward.register_fake
def _(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    chunk_size: int | None,
    wants: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    loss = hidden.new_empty((), dtype=accumulation_dtype(hidden, weight))
    grad_hidden, grad_weight = _shapes(loss, hidden, weight, wants)
    return loss, grad_hidden, grad_weight


@torch.library.custom_op("neural_layers::linear_cross_entropy_backward", mutates_args=())
def _backward(
    grad_loss: Tensor,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    chunk_size: int | None,
    wants: list[bool],
    backend: str,
) -> list[Tensor]:
    """grad_loss · the gradients, made again."""
    run = IMPLEMENTATIONS[backend]
    _, gradients = run(hidden, weight, target, ignore_index, label_smoothing, chunk_size, wants)
    return [gradient.mul_(grad_loss) for gradient in gradients]


@_backward.register_fake
def _(
    grad_loss: Tensor,
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    chunk_size: int | None,
    wants: list[bool],
    backend: str,
) -> list[Tensor]:
    return _shapes(grad_loss, hidden, weight, wants)


def _shapes(loss: Tensor, hidden: Tensor, weight: Tensor, wants: list[bool]) -> list[Tensor]:
    pairs = zip((hidden, weight), wants, strict=True)
    return [loss.new_empty(tensor.shape if is_wanted else (0,)) for tensor, is_wanted in pairs]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor, Tensor]) -> None:
    hidden, weight, target, *ctx.options = inputs
    ctx.save_for_backward(hidden, weight, target)
    keep_gradients(ctx, (hidden, weight), output[1:], ctx.options[3])


def _differentiate(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Any, ...]:
    return (*take_gradients(ctx, grad_loss, _backward), *[None] * 6)


def _refuse(ctx: Any, *grads: Any) -> None:
    raise NotImplementedError(
        "this backend of linear_cross_entropy has no gradient of the gradient; use backend='reference'"
    )


_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(_refuse)
