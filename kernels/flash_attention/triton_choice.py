"""When the Triton kernels of attention run, without importing triton."""

from typing import Any

from torch import Tensor

from neural_layers.kernels import triton_support
from neural_layers.kernels.flash_attention.sdpa import sdpa_obstacle

# A program holds all columns of its rows.
_WIDEST = 256


def triton_obstacle(q: Tensor, k: Tensor, v: Tensor, **rest: Any) -> str | None:
    """Why the Triton kernels cannot serve this call."""
    reason = triton_support.obstacle(q, k, v, **rest)
    if reason is None and rest["dropout_p"] > 0:
        return "the Triton kernels draw no dropout"
    if reason is None and rest["chunk_size"] is not None:
        return "chunk_size asks for the chunked algorithm in torch"
    if reason is None and max(k.shape[-1], v.shape[-1]) > _WIDEST:
        return f"the Triton kernels take heads up to a width of {_WIDEST}"
    return reason


def triton_avoid(q: Tensor, k: Tensor, v: Tensor, **rest: Any) -> str | None:
    """Why another backend is better for this call."""
    reason = triton_support.avoid(q, k, v, **rest)
    if reason is None and _needs_no_mask(q, k, **rest) and sdpa_obstacle(q, k, v, **rest) is None:
        return "torch's own attention kernels are made for a call without a mask"
    return reason


def _needs_no_mask(
    q: Tensor,
    k: Tensor,
    *,
    causal: bool,
    window: int | None,
    key_padding_mask: Tensor | None,
    seq_idx: Tensor | None,
    **rest: Any,
) -> bool:
    """Whether SDPA can serve the call without a mask, with which it is slower or leaves its best kernels."""
    T, S = q.shape[1], k.shape[1]
    if key_padding_mask is not None or seq_idx is not None:
        return False
    return T == 1 or ((window is None or window >= max(T, S)) and (not causal or T == S))
