"""A sum over rows of logits that are never there for more than a chunk of rows.

The gradients are made in the forward pass, as those of `linear_kl_div` are (arXiv 2410.10989): by autograd for the few
rows whose logits are in the cache, and by two products on to the hidden states and the head.

Letters: N rows, V vocabulary, D width.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from neural_layers.kernels.chunked_loss import Head
from neural_layers.kernels.chunked_loss.pytorch import chunked_mean

RowLoss = Callable[[Tensor, list[Tensor], Tensor], Tensor]
"""(student's logits (C, V), those of the other heads, numbers of these rows (C)) → losses (C)"""


def chunked_sum(
    loss: RowLoss, hidden: Tensor, head: Tensor, *others: tuple[Tensor, Tensor], scale: float = 1.0
) -> Tensor:
    """Σ over rows n of loss(scale · hidden @ head.T, …), with gradients for `hidden` and `head`.

    hidden: (N, D), head: (V, D); others: pairs like these, of the teacher, without gradients
    Returns a number, 0 where there are no rows, in float64 where a tensor is and in float32 otherwise.
    """
    if not len(hidden):
        return no_rows(hidden, head)
    return _ChunkedSum.apply(hidden, head, loss, others, scale)


def no_rows(hidden: Tensor, head: Tensor) -> Tensor:
    """Zero with gradients of zero: what no rows (0, D) cost."""
    dtype = torch.promote_types(torch.promote_types(hidden.dtype, head.dtype), torch.float32)
    return hidden.sum(dtype=dtype) + head[:0].sum(dtype=dtype)


class _ChunkedSum(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        head: Tensor,
        loss: RowLoss,
        others: tuple[tuple[Tensor, Tensor], ...],
        scale: float,
    ) -> Tensor:
        ctx.save_for_backward(hidden, head)
        ctx.loss, ctx.others, ctx.scale = loss, others, scale
        total, ctx.gradients = _run(hidden, head, loss, others, scale, ctx.needs_input_grad[:2])
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_total: Tensor) -> tuple[Tensor | None, ...]:
        gradients, ctx.gradients = ctx.gradients, None
        hidden, head = ctx.saved_tensors
        if gradients is None:  # a graph that was retained: those of the first time were given away, scaled in place
            gradients = _run(hidden, head, ctx.loss, ctx.others, ctx.scale, ctx.needs_input_grad[:2])[1]
        given = zip(gradients, (hidden, head), ctx.needs_input_grad[:2], strict=True)
        scaled = [grad.mul_(grad_total).to(tensor.dtype) if wants else None for grad, tensor, wants in given]
        return (*scaled, None, None, None)


def _run(
    hidden: Tensor,
    head: Tensor,
    loss: RowLoss,
    others: tuple[tuple[Tensor, Tensor], ...],
    scale: float,
    wants: tuple[bool, ...],
) -> tuple[Tensor, list[Tensor]]:
    def formula(logits: list[Tensor], rows: Tensor, wanting: list[bool]) -> Tensor:
        if not wanting[0]:
            return loss(logits[0], logits[1:], rows)
        with torch.enable_grad():
            student = logits[0].detach().requires_grad_()
            losses = loss(student, logits[1:], rows)
            (gradient,) = torch.autograd.grad(losses.sum(), student)
        logits[0].copy_(gradient)
        return losses.detach()

    rows = torch.arange(len(hidden), device=hidden.device)
    heads = [Head(hidden, head, *wants), *(Head(*other, False, False) for other in others)]
    # A GPU would wait for the starts of many small kernels.
    whole = hidden.device.type != "cpu"
    mean, gradients = chunked_mean(heads, rows, formula, scale=scale, factor=float(len(rows)), whole_chunks=whole)
    return mean, gradients[:2]
