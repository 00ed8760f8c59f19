"""Attention in C (backend `native`): native.c, native_backward.c, tiles.h, attention.h."""

import struct
from typing import Any

import torch
from torch import Tensor

from neural_layers.kernels import c_library

# The struct Attention of attention.h: addresses, strides, sizes, then scale and softcap.
_CALL = struct.Struct("16P12q11q2d")
# Multiplications of a call for which a second thread would take longer to start than to help.
_SMALL = 2**21


def native_obstacle(
    q: Tensor, k: Tensor, v: Tensor, *, dropout_p: float, chunk_size: int | None, **rest: Any
) -> str | None:
    """Why the C kernels cannot serve this call."""
    reason = c_library.obstacle(q, k, v)
    if reason is None and dropout_p > 0:
        return "the C kernels draw no dropout"
    if reason is None and chunk_size is not None:
        return "chunk_size asks for the chunked algorithm in torch"
    return reason


def native_avoid(q: Tensor, k: Tensor, v: Tensor, **rest: Any) -> str | None:
    """Why another backend is better for this call."""
    if torch.compiler.is_exporting():
        return "an exported graph also runs where there is no C library"
    return None


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    key_padding_mask: Tensor | None,
    seq_idx: Tensor | None,
    seed: None,
    causal: bool,
    window: int | None,
    scale: float,
    softcap: float | None,
    dropout_p: float,
    chunk_size: None,
) -> tuple[Tensor, Tensor]:
    """The output (B, T, H, V), and the log-sum-exp of each row (B·G, T·M)."""
    (B, T, H, _), (G, V) = q.shape, v.shape[2:]
    dtype = torch.float64 if q.dtype == torch.float64 else torch.float32
    out, lse = q.new_empty((B, T, H, V)), q.new_empty((B * G, T * (H // G)), dtype=dtype)
    optional = _optional(alibi_slopes, sinks, key_padding_mask, seq_idx, dtype)
    made = lse, out, None, None, None, None, None
    _call("flash_attention_forward", (q, k, v), None, None, optional, made, (causal, window, scale, softcap))
    return out, lse


def backward(
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
    seed: None,
    causal: bool,
    window: int | None,
    scale: float,
    softcap: float | None,
    dropout_p: float,
    chunk_size: None,
    slopes_need_grad: bool,
) -> list[Tensor]:
    """The gradients of q, k, v, of alibi_slopes where asked for, and of sinks where there are any."""
    optional = _optional(alibi_slopes, sinks, key_padding_mask, seq_idx, lse.dtype)
    grads = [x.new_empty(x.shape) for x in (q, k, v)]
    dslopes = optional[0].new_empty(q.shape[2]) if slopes_need_grad and optional[0] is not None else None
    dsinks = None if optional[1] is None else optional[1].new_empty(q.shape[2])
    made = lse, None, *grads, dslopes, dsinks
    _call("flash_attention_backward", (q, k, v), out, grad, optional, made, (causal, window, scale, softcap))
    for parameter, gradient in ((alibi_slopes, dslopes), (sinks, dsinks)):
        if parameter is not None and gradient is not None:
            grads.append(gradient.to(parameter.dtype))
    return grads


def _optional(
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    key_padding_mask: Tensor | None,
    seq_idx: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor | None, ...]:
    """As the kernels read them."""
    if alibi_slopes is sinks is key_padding_mask is seq_idx is None:
        return None, None, None, None
    return (
        None if alibi_slopes is None else alibi_slopes.to(dtype).contiguous(),
        None if sinks is None else sinks.to(dtype).contiguous(),
        None if key_padding_mask is None else key_padding_mask.contiguous(),
        None if seq_idx is None else seq_idx.to(torch.int64).contiguous(),
    )


def _call(
    name: str,
    qkv: tuple[Tensor, Tensor, Tensor],
    out: Tensor | None,
    grad: Tensor | None,
    optional: tuple[Tensor | None, ...],
    made: tuple[Tensor | None, ...],
    settings: tuple[bool, int | None, float, float | None],
) -> None:
    """Run the function of the C library; `made` begins with lse."""
    q, k, v = _packed(qkv[0]), _packed(qkv[1]), _packed(qkv[2])
    out, grad = None if out is None else out.contiguous(), None if grad is None else _packed(grad)
    causal, window, scale, softcap = settings
    (B, T, H, K), (_, S, G, V), lse = q.shape, v.shape, made[0]
    assert lse is not None
    strides = *q.stride()[:3], *k.stride()[:3], *v.stride()[:3], *(q if grad is None else grad).stride()[:3]
    work = B * H * T * (K + V) * (S if window is None else min(S, 2 * window))
    threads = torch.get_num_threads() if work > _SMALL else 1
    window = 0 if window is None else min(window, T + S)
    sizes = B, T, S, H, G, K, V, c_library.code(q, lse.dtype), causal, window, threads
    addresses = [0 if x is None else x.data_ptr() for x in (q, k, v, out, grad, *optional, *made)]
    c_library.record_function(name, lse.dtype)(_CALL.pack(*addresses, *strides, *sizes, scale, softcap or 0.0))


def _packed(x: Tensor) -> Tensor:
    """With neighbouring elements in the last dimension; the others may have any stride."""
    return x if x.stride(-1) == 1 else x.contiguous()
