"""Attention as torch sees it: one opaque op with its gradient, run by one of the implementations below.

`backend` names the implementation and is the ops' last argument, so that all of them share what torch needs to know:
the shapes (fake) and the derivative.

Dimension letters: B batch, T query length, S key length, H query heads, G key/value heads, M = H / G, K head width,
V value width.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from neural_layers.kernels.arguments import accumulation_dtype
from neural_layers.kernels.c_library import autograd_alone, differentiable, unwatched
from neural_layers.kernels.flash_attention import native, pytorch
from neural_layers.kernels.triton_support import deferred

# name → (forward(the op's arguments) → out, lse;  backward(grad, out, lse, the op's arguments, slopes_need_grad) →
# the gradients), where lse is the log-sum-exp of each row (B·G, T·M) in units of ln 2, +inf for a row without keys
IMPLEMENTATIONS: dict[str, tuple[Callable[..., Any], Callable[..., Any]]] = {
    "native": (native.forward, native.backward),
    "triton": (
        deferred("flash_attention.triton_forward", "forward"),
        deferred("flash_attention.triton_backward", "backward"),
    ),
    "torch": (pytorch.forward, pytorch.backward),
}


def flash_attention_fused(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool = False,
    window: int | None = None,
    alibi_slopes: Tensor | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    key_padding_mask: Tensor | None = None,
    seq_idx: Tensor | None = None,
    dropout_p: float = 0.0,
    chunk_size: int | None = None,
    implementation: str,
) -> Tensor:
    """softmax(score) v by the implementation of that name, and by the least of torch's machinery that the call needs.

    With dropout, one seed is drawn from torch's global generator of the CPU for each call.
    """
    seed = torch.randint(2**62, ()) if dropout_p > 0 else None
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    tensors = q, k, v, alibi_slopes, sinks, key_padding_mask, seq_idx, seed
    numbers = causal, window, scale, softcap, dropout_p, chunk_size
    if unwatched(q, k, v, alibi_slopes, sinks):
        return IMPLEMENTATIONS[implementation][0](*tensors, *numbers)[0]
    run = _differentiable if autograd_alone(q, k, v, alibi_slopes, sinks) else _forward
    return run(*tensors, *numbers, implementation)[0]


def _run(*arguments: Any) -> tuple[Tensor, Tensor]:
    return IMPLEMENTATIONS[arguments[-1]][0](*arguments[:-1])


@torch.library.custom_op("neural_layers::flash_attention", mutates_args=())
def _forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    key_padding_mask: Tensor | None,
    seq_idx: Tensor | None,
    seed: Tensor | None,
    causal: bool,
    window: int | None,
    scale: float,
    softcap: float | None,
    dropout_p: float,
    chunk_size: int | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """The output (B, T, H, V) and the log-sum-exp of each row."""
    return _run(
        q, k, v, alibi_slopes, sinks, key_padding_mask, seq_idx, seed, causal, window, scale, softcap, dropout_p,
        chunk_size, backend,
    )  # fmt: skip


@torch.library.custom_op("neural_layers::flash_attention_backward", mutates_args=())
def _backward(
    grad: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    key_padding_mask: Tensor | None,
    seq_idx: Tensor | None,
    seed: Tensor | None,
    causal: bool,
    window: int | None,
    scale: float,
    softcap: float | None,
    dropout_p: float,
    chunk_size: int | None,
    slopes_need_grad: bool,
    backend: str,
) -> list[Tensor]:
    """The gradients of q, k, v, of alibi_slopes where asked for, and of sinks where there are any."""
    return IMPLEMENTATIONS[backend][1](
        grad, out, lse, q, k, v, alibi_slopes, sinks, key_padding_mask, seq_idx, seed, causal, window, scale, softcap,
        dropout_p, chunk_size, slopes_need_grad,
    )  # fmt: skip


@_forward.register_fake
def _(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    B, T, H, _ = q.shape
    G = k.shape[2]
    return q.new_empty(B, T, H, v.shape[-1]), q.new_empty(B * G, T * (H // G), dtype=accumulation_dtype(q))


@_backward.register_fake
def _(grad: Tensor, out: Tensor, lse: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> list[Tensor]:
    alibi_slopes, sinks, slopes_need_grad = rest[0], rest[1], rest[-2]
    like = [q, k, v]
    like += [alibi_slopes] if slopes_need_grad else []
    like += [] if sinks is None else [sinks]
    return [x.new_empty(x.shape) for x in like]


def _save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(*output, *inputs[:8])
    ctx.mark_non_differentiable(output[1])
    ctx.settings = inputs[8:]


def _differentiate(ctx: Any, grad: Tensor, grad_lse: Tensor) -> tuple[Tensor | None, ...]:
    out, lse, *tensors = ctx.saved_tensors
    *numbers, backend = ctx.settings
    slopes_need_grad = ctx.needs_input_grad[3]
    arguments = grad, out, lse, *tensors, *numbers, slopes_need_grad
    watched = not unwatched(grad, out, *tensors[:5])
    dq, dk, dv, *others = _backward(*arguments, backend) if watched else IMPLEMENTATIONS[backend][1](*arguments)
    dslopes = others.pop(0) if slopes_need_grad else None
    dsinks = others.pop(0) if tensors[4] is not None else None
    return (dq, dk, dv, dslopes, dsinks) + (None,) * 10


def _refuse(ctx: Any, *grads: Any) -> None:
    raise NotImplementedError(
        "this backend of flash_attention has no gradient of the gradient; use backend='reference'"
    )


_forward.register_autograd(_differentiate, setup_context=_save)
_backward.register_autograd(_refuse)
_differentiable = differentiable(_run, _save, _differentiate)
