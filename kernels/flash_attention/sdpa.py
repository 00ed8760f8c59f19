"""Attention by torch's scaled_dot_product_attention, where it serves exactly and in bounded memory.

A window is served by folding: queries are cut into blocks, and each block with the slice of keys that its window
reaches becomes one row of the batch, under a small mask. One call then does it all, in memory linear in T, and without
a loop over blocks, which torch.compile would unroll for one length. Under causal the first queries, which see all keys
before them, are a call of their own.

Dimension letters: B batch, T query length, S key length, H query heads, G key/value heads, K head width,
N blocks, C queries of a block, L keys of a block.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad, scaled_dot_product_attention

from neural_layers.kernels.flash_attention.blocks import Visibility

# Elements of a mask for each query and key: 16 MiB once SDPA has made floats of them. From here on backend `torch`,
# which skips hidden blocks, is as fast under causal (86 ms against 108 at T = 2048).
_MASK_LIMIT = 2**22


def sdpa_obstacle(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    causal: bool,
    window: int | None,
    alibi_slopes: Tensor | None,
    scale: float | None,
    softcap: float | None,
    sinks: Tensor | None,
    key_padding_mask: Tensor | None,
    seq_idx: Tensor | None,
    dropout_p: float,
    chunk_size: int | None,
) -> str | None:
    """Why SDPA cannot serve this call."""
    if alibi_slopes is not None:
        return "alibi_slopes would need a bias with an element for each head, query and key"
    if softcap is not None:
        return "SDPA has no softcap"
    if sinks is not None:
        return "SDPA has no sinks"
    if chunk_size is not None:
        return "chunk_size asks for the chunked algorithm"
    if q.shape[-1] != v.shape[-1]:
        return "SDPA builds the whole score matrix where values are not as wide as keys"
    if dropout_p > 0 and q.device.type == "cpu":
        return "SDPA on the CPU builds the whole score matrix for dropout"
    if q.dtype == torch.float64 and q.device.type != "cpu":
        return "SDPA on a GPU builds the whole score matrix for float64"
    if window is not None and torch.compiler.is_exporting():
        return "an exported graph serves all lengths, and SDPA takes another path for a window in each range of them"
    T, S = q.shape[1], k.shape[1]
    rule = Visibility(T, S, causal, window, key_padding_mask, seq_idx)
    if T == 1 or rule.effective_window is None:
        rows = q.shape[0] if key_padding_mask is not None or seq_idx is not None else 1
        if _needs_pairs(rule) and rows * T * S >= _MASK_LIMIT:
            return f"SDPA needs a mask with an element for each query and key, here {_MASK_LIMIT} or more"
    return None


def sdpa_avoid(q: Tensor, k: Tensor, v: Tensor, **rest: Any) -> str | None:
    """Why the chunked algorithm is better for this call."""
    if q.dtype == torch.float16 and q.device.type == "cpu" and not torch.compiler.is_exporting():
        return "SDPA on the CPU is slow in float16, its gradient 2 to 7 times slower than the chunked algorithm"
    return None


def _needs_pairs(rule: Visibility) -> bool:
    """Whether a mask without window needs an element for each query and key."""
    if rule.T == 1:
        return False
    if rule.seq_idx is not None:
        return True
    return rule.causal and (rule.T != rule.S or rule.key_padding_mask is not None)


def flash_attention_sdpa(
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
    """softmax(score) v; `sdpa_obstacle` has refused the arguments that are not used here."""
    T, S = q.shape[1], k.shape[1]
    rule = Visibility(T, S, causal, window, key_padding_mask, seq_idx)
    if window is not None and rule.effective_window is not None:
        if _block_length(window, q) < T:
            return _windowed(q, k, v, rule, scale, dropout_p)
        reached = max(S - (T + window - 1), 0)  # the first key that the first query reaches
        k, v = k[:, reached:], v[:, reached:]
        key_padding_mask, seq_idx = (None if x is None else x[:, reached:] for x in (key_padding_mask, seq_idx))
        rule = Visibility(T, k.shape[1], causal, window, key_padding_mask, seq_idx)
    if T == 1:  # a single query stands at the last key, and the window ends at the first
        rule = rule.without_positions()
    if rule.causal and rule.effective_window is None and T == rule.S and key_padding_mask is None and seq_idx is None:
        return _sdpa(q, k, v, None, True, scale, dropout_p)
    return _sdpa(q, k, v, rule.allowed(0, T, 0, rule.S, q.device), False, scale, dropout_p)


def _block_length(window: int, q: Tensor) -> int:
    """Queries of a block: short ones meet fewer keys in vain, but keys are copied for each block of a batch.

    Measured with a window of 512 on the CPU: with one sequence, whose keys are read in place, 64 is best, 14 % faster
    than 128; with two 64 is 2 % faster, for twice the memory.
    """
    return max(64, window // 8) if q.shape[0] == 1 and q.device.type == "cpu" else max(128, window // 4)


def _sdpa(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool, scale: float | None, dropout_p: float
) -> Tensor:
    """SDPA on (B, T, H, K) and (B, S, G, K), with a mask that broadcasts to (B, T, S)."""
    # The fused kernels need the last dimension packed; without it SDPA builds the whole score matrix.
    q, k, v = (x if x.stride(-1) == 1 else x.contiguous() for x in (q, k, v))
    out_BHTK = scaled_dot_product_attention(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        attn_mask=None if mask is None else mask.unsqueeze(1),
        dropout_p=dropout_p,
        is_causal=is_causal,
        scale=scale,
        enable_gqa=q.shape[2] != k.shape[2],
    )
    return out_BHTK.transpose(1, 2)


def _windowed(q: Tensor, k: Tensor, v: Tensor, rule: Visibility, scale: float | None, dropout_p: float) -> Tensor:
    """The first `window` queries of a causal sequence see all keys before them; all others see a window in full."""
    window = rule.effective_window
    assert window is not None
    if not rule.causal or rule.T != rule.S or rule.key_padding_mask is not None or rule.seq_idx is not None:
        return _folded(q, k, v, rule, scale, dropout_p, all_exist=False)
    first = _sdpa(q[:, :window], k[:, :window], v[:, :window], None, True, scale, dropout_p)
    later = _folded(q[:, window:], k, v, replace(rule, T=rule.T - window), scale, dropout_p, all_exist=True)
    return torch.cat([first, later], dim=1)


def _folded(
    q: Tensor, k: Tensor, v: Tensor, rule: Visibility, scale: float | None, dropout_p: float, *, all_exist: bool
) -> Tensor:
    """Blocks of C queries, each with the L keys that its window reaches, as a batch of B·N.

    all_exist: every key in the window of every query exists and counts, so that one mask serves all blocks
    """
    (B, T, H, K), S = q.shape, rule.S
    window = rule.effective_window
    assert window is not None
    ahead = 0 if rule.causal else window - 1
    C = _block_length(window, q)
    N = (T + C - 1) // C
    L = window - 1 + C + ahead
    front, back = window - 1 - (S - T), N * C - T + ahead

    def fold(x: Tensor) -> Tensor:
        """(B, S, …) → (B·N, L, …); positions without a key become 0. A view where B is 1."""
        return _extended(x, front, back).unfold(1, L, C).movedim(-1, 2).reshape(x.shape[0] * N, L, *x.shape[2:])

    def fold_queries(x: Tensor) -> Tensor:
        """(B, S, …) → (B·N, C, …)."""
        return _extended(x, 0, N * C - T).reshape(x.shape[0] * N, C, *x.shape[2:])

    # Query c of a block sees its keys c … c + L − C: the window, whichever block it is.
    lead_CL = torch.arange(L, device=q.device) - torch.arange(C, device=q.device).unsqueeze(-1)
    mask = ((lead_CL >= 0) & (lead_CL <= L - C)).unsqueeze(0)
    if not all_exist:
        exists = torch.ones(1, S, dtype=torch.bool, device=q.device)
        mask = mask & fold(exists if rule.key_padding_mask is None else rule.key_padding_mask).unsqueeze(1)
        mask = mask.repeat(B, 1, 1) if mask.shape[0] != B * N else mask
    if rule.seq_idx is not None:
        mask = mask & (fold_queries(rule.seq_idx[:, S - T :]).unsqueeze(-1) == fold(rule.seq_idx).unsqueeze(1))
    out = _sdpa(fold_queries(q), fold(k), fold(v), mask, False, scale, dropout_p)
    return out.reshape(B, N * C, H, K)[:, :T]


def _extended(x: Tensor, front: int, back: int) -> Tensor:
    """(B, S, …) with that many zeros before and after; a negative count crops."""
    return pad(x, (0, 0) * (x.ndim - 2) + (front, back))
