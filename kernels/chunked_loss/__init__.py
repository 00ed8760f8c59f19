"""What the losses of output logits share: checks, chunks, and gradients that are made in the forward pass.

Such a loss is a mean over tokens of a formula of their rows of logits, `scale · hidden @ weight.T`, for one head (a
model that is trained on labels) or several (student and teacher). All the logits at once would be by far the largest
tensor of a model, so they are made for a chunk of tokens at a time. Once they are there, so is everything that their
gradient needs: it replaces them, and two products carry it on to the hidden states and into the weight's gradient (as
Liger does, arXiv 2410.10989). The backward pass then multiplies by one number.

`pytorch.py` runs any formula; `native.py` those that native.c knows.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neural_layers.kernels.arguments import check_floats
from neural_layers.kernels.c_library import autograd_alone

# A product of fewer rows spends its time on fetching the weight, and one of more gains nothing.
_MOST_ROWS, _MOST_LOGITS = 256, 2**25


@dataclass(frozen=True)
class Head:
    """Hidden states (..., D), the output matrix (V, D), and which of their gradients are wanted."""

    hidden: Tensor
    weight_VD: Tensor
    wants_hidden: bool
    wants_weight: bool


def rows_of_chunk(chunk_size: int | None, tokens: Tensor, vocabulary: int) -> int:
    """How many tokens to take at once: at least 1, also where there are none."""
    chunk = chunk_size or max(16, min(_MOST_ROWS, _MOST_LOGITS // vocabulary))
    return max(1, min(chunk, len(tokens)))


def spans(length: int, step: int) -> Iterator[tuple[int, int]]:
    """0 … length in steps, the last one ragged."""
    return ((start, min(start + step, length)) for start in range(0, length, step))


def empty_gradients(head: Head, tokens: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Room for the gradients of the hidden states (T, D) and of the weight, without elements where not wanted.

    What no chunk will write is zero: tokens that do not count, and everything where none does.
    """
    # A gradient that is not wanted is a tensor of its own all the same: outputs of an op may not be one another.
    hidden = head.hidden.reshape(-1, head.hidden.shape[-1])
    grad_hidden, grad_weight = (hidden.new_empty(0, dtype=dtype) for _ in range(2))
    if head.wants_hidden:
        make = torch.empty_like if len(tokens) == len(hidden) else torch.zeros_like
        grad_hidden = make(hidden, dtype=dtype, memory_format=torch.contiguous_format)
    if head.wants_weight:
        make = torch.empty_like if len(tokens) else torch.zeros_like
        grad_weight = make(head.weight_VD, dtype=dtype, memory_format=torch.contiguous_format)
    return grad_hidden, grad_weight


def check_head(**tensors: Tensor) -> None:
    """Check hidden states (..., D) and an output matrix (V, D), given by their names in this order."""
    check_floats(**tensors)
    (hidden_name, hidden), (weight_name, weight) = tensors.items()
    if hidden.ndim == 0 or weight.ndim != 2 or weight.shape[1] != hidden.shape[-1]:
        raise ValueError(
            f"{weight_name} has shape {tuple(weight.shape)}; expected (V, D) for {hidden_name} (..., D) of shape "
            f"{tuple(hidden.shape)}"
        )
    if weight.shape[0] == 0:
        raise ValueError(f"{weight_name} has shape {tuple(weight.shape)}; expected a vocabulary of at least V=1")


def check_chunk_size(chunk_size: int | None) -> None:
    """Raise ValueError for a chunk without tokens."""
    if chunk_size is not None and chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} must be at least 1, or None for the default")


def wanted(*tensors: Tensor) -> list[bool]:
    """Which of the tensors a gradient will be asked for."""
    return [tensor.requires_grad and torch.is_grad_enabled() for tensor in tensors]


def keep_gradients(ctx: Any, tensors: Sequence[Tensor], gradients: Sequence[Tensor], wants: Sequence[bool]) -> None:
    """Hold the gradients that an op returns beside its loss for `take_gradients`, as gradients of its first inputs."""
    # A gradient of the gradient does not come from here, and zeros for it would cost as much as they.
    ctx.mark_non_differentiable(*gradients)
    ctx.set_materialize_grads(False)
    ctx.wants, ctx.dtypes = wants, [tensor.dtype for tensor in tensors]
    # Detached: an output that its own node holds would be a cycle, and live until the garbage is collected.
    ctx.gradients = [gradient.detach() for gradient in gradients]


def take_gradients(
    ctx: Any, grad_loss: Tensor | None, recompute: Callable[..., Sequence[Tensor]]
) -> list[Tensor | None]:
    """grad_loss · each gradient in the dtype of its input, None where not wanted.

    The first call hands out the tensors that the forward pass made, scaled in place: a copy would double the memory of
    a large output matrix. A later one, on a graph that was retained, makes them anew by recompute(grad_loss, …), which
    takes all the op's arguments, and gives the same bits.
    """
    if grad_loss is None:
        return [None] * len(ctx.wants)
    gradients, ctx.gradients = ctx.gradients, None
    # Where a graph of the backward pass is recorded, the op that refuses the second derivative must stand in it.
    if gradients is None or torch.is_grad_enabled():
        gradients = recompute(grad_loss, *ctx.saved_tensors, *ctx.options)
    elif autograd_alone(grad_loss, *gradients):
        gradients = [gradient.mul_(grad_loss) for gradient in gradients]
    else:  # in a traced graph these are its own tensors, which it may still return or use again
        gradients = [gradient * grad_loss for gradient in gradients]
    given = zip(gradients, ctx.dtypes, ctx.wants, strict=True)
    return [gradient.to(dtype) if wants else None for gradient, dtype, wants in given]
