"""The definition of attention: the whole (T, S) matrix, in plain arithmetic.

Dimension letters: B batch, T query length, S key length, H query heads, G key/value heads, K head width.
"""

from typing import Any

import torch
from torch import Tensor

from neural_layers.kernels.arguments import accumulation_dtype
from neural_layers.kernels.flash_attention.blocks import Visibility


def flash_attention_reference(
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
) -> Tensor:
    """out_t = Σ_s P_ts v_s with P = exp(score) / (Σ_s exp(score) + exp(sink)) over the keys that t sees."""
    (T, H, K), (S, G) = q.shape[1:], k.shape[1:3]
    wide = accumulation_dtype(q, k, v)
    k_BSHK, v_BSHK = (x.to(wide).repeat_interleave(H // G, dim=2) for x in (k, v))
    score_BHTS = torch.einsum("bthk,bshk->bhts", q.to(wide), k_BSHK) * (K**-0.5 if scale is None else scale)
    if softcap is not None:
        score_BHTS = softcap * torch.tanh(score_BHTS / softcap)
    if alibi_slopes is not None:
        query_T1 = torch.arange(T, device=q.device).unsqueeze(-1) + (S - T)
        distance_TS = (query_T1 - torch.arange(S, device=q.device)).abs()
        score_BHTS = score_BHTS - alibi_slopes.to(wide).view(H, 1, 1) * distance_TS

    allowed = Visibility(T, S, causal, window, key_padding_mask, seq_idx).allowed(0, T, 0, S, q.device)
    if allowed is not None:
        score_BHTS = score_BHTS.masked_fill(~allowed.unsqueeze(1), float("-inf"))
    probability_BHTS = _softmax(score_BHTS, None if sinks is None else sinks.to(wide).view(H, 1))
    if dropout_p > 0:
        keep_BHTS = torch.rand_like(probability_BHTS) >= dropout_p
        probability_BHTS = probability_BHTS * keep_BHTS / (1 - dropout_p)
    return torch.einsum("bhts,bshk->bthk", probability_BHTS, v_BSHK).to(q.dtype)


def _softmax(score_BHTS: Tensor, sink_H1: Tensor | None) -> Tensor:
    """Softmax over S with the sink in the denominator; a row of −inf alone gives zeros."""
    logits = score_BHTS.detach()
    if sink_H1 is not None:
        logits = torch.cat([logits, sink_H1.detach().unsqueeze(-1).expand(*logits.shape[:-1], 1)], dim=-1)
    # Any shift cancels, so the maximum needs no gradient; a first column keeps it defined where there is no key.
    shift_BHT = torch.nn.functional.pad(logits, (1, 0), value=float("-inf")).amax(dim=-1)
    shift_BHT = shift_BHT.masked_fill(shift_BHT == float("-inf"), 0)
    weight_BHTS = torch.exp(score_BHTS - shift_BHT.unsqueeze(-1))
    total_BHT = weight_BHTS.sum(dim=-1)
    if sink_H1 is not None:
        total_BHT = total_BHT + torch.exp(sink_H1 - shift_BHT)
    return weight_BHTS / total_BHT.masked_fill(total_BHT == 0, 1).unsqueeze(-1)


def reference_obstacle(*tensors: Tensor, chunk_size: int | None, **rest: Any) -> str | None:
    """Why the definition cannot serve this call."""
    return None if chunk_size is None else "chunk_size bounds memory; the reference builds the whole matrix"
