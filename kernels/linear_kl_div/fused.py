"""linear_kl_div as torch sees it: one opaque op that makes loss and gradients, whichever implementation runs it.

An implementation takes exactly the arguments of `_forward` less `backend`, and returns the loss and the gradients of
the first four tensors, all in the accumulation dtype; a gradient that is not wanted has no elements.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from neural_layers.kernels.arguments import accumulation_dtype
from neural_layers.kernels.chunked_loss import keep_gradients, take_gradients, wanted
from neural_layers.kernels.linear_kl_div import native, pytorch
from neural_layers.kernels.triton_support import deferred

IMPLEMENTATIONS: dict[str, Callable[..., tuple[Tensor, list[Tensor]]]] = {
    "native": native.run,
    "triton": deferred("linear_kl_div.triton_rows", "run"),
    "torch": pytorch.run,
}


def linear_kl_div_fused(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    chunk_size: int | None = None,
    backend: str,
) -> Tensor:
    """T² · KL(teacher ‖ student) in chunks of tokens."""
    tensors = (student_hidden, student_weight, teacher_hidden, teacher_weight)
    return _forward(*tensors, mask, temperature, chunk_size, wanted(*tensors), backend)[0]


@torch.library.custom_op("neural_layers::linear_kl_div", mutates_args=())
def _forward(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    mask: Tensor | None,
    temperature: float,
    chunk_size: int | None,
    wants: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The loss, and the gradients of the first four tensors where wanted."""
    tensors = (student_hidden, student_weight, teacher_hidden, teacher_weight)
    loss, gradients = IMPLEMENTATIONS[backend](*tensors, mask, temperature, chunk_size, wants)
    return loss, gradients[0], gradients[1], gradients[2], gradients[3]


@_forward.register_fake
def _(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    mask: Tensor | None,
    temperature: float,
    chunk_size: int | None,
    wants: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    tensors = (student_hidden, student_weight, teacher_hidden, teacher_weight)
    loss = student_hidden.new_empty((), dtype=accumulation_dtype(*tensors))
    gradients = _shapes(loss, tensors, wants)
    return loss, gradients[0], gradients[1], gradients[2], gradients[3]


@torch.library.custom_op("neural_layers::linear_kl_div_backward", mutates_args=())
def _backward(
    grad_loss: Tensor,
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    mask: Tensor | None,
    temperature: float,
    chunk_size: int | None,
    wants: list[bool],
    backend: str,
) -> list[Tensor]:
    """grad_loss · the gradients, made again."""
    tensors = (student_hidden, student_weight, teacher_hidden, teacher_weight)
    _, gradients = IMPLEMENTATIONS[backend](*tensors, mask, temperature, chunk_size, wants)
    return [gradient.mul_(grad_loss) for gradient in gradients]


@_backward.register_fake
def _(
    grad_loss: Tensor,
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    mask: Tensor | None,
    temperature: float,
    chunk_size: int | None,
    wants: list[bool],
    backend: str,
) -> list[Tensor]:
    return _shapes(grad_loss, (student_hidden, student_weight, teacher_hidden, teacher_weight), wants)


def _shapes(loss: Tensor, tensors: tuple[Tensor, ...], wants: list[bool]) -> list[Tensor]:
    pairs = zip(tensors, wants, strict=True)
    return [loss.new_empty(tensor.shape if is_wanted else (0,)) for tensor, is_wanted in pairs]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, mask = inputs[:5]
    ctx.options = inputs[5:]
    ctx.save_for_backward(*tensors, mask)
    keep_gradients(ctx, tensors, output[1:], ctx.options[2])


def _differentiate(ctx: Any, grad_loss: Tensor | None, *_: Any) -> tuple[Any, ...]:
    return (*take_gradients(ctx, grad_loss, _backward), *[None] * 5)


def _refuse(ctx: Any, *grads: Any) -> None:
    raise NotImplementedError("this backend of linear_kl_div has no gradient of the gradient; use backend='reference'")


_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(_refuse)
