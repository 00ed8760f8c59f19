"""Self-attention: the core without projections, and grouped-query attention with them.

Letters: B batch, T query length, S key length, D width, H query heads, G key/value heads, K head width.
"""

from typing import Any, Protocol

import torch
from torch import Tensor, nn

from neural_layers.kernels.flash_attention import flash_attention
from neural_layers.kernels.rotary import apply_rotary
from neural_layers.linear import Linear
from neural_layers.norm import RMSNorm
from neural_layers.position import RotaryEmbedding, alibi_slopes


class KeyValueCache(Protocol):
    """What attention asks of a cache: ours (`LayerCache`) and the layers of transformers' caches have it."""

    def get_seq_length(self) -> int: ...

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]: ...


class FlashAttention(nn.Module):
    """The attention core: softmax(q·kᵀ·scale + …)·v in blocks, without projections.

    causal, window, scale, softcap, chunk_size: as in `neural_layers.functional.flash_attention`.
    alibi_heads: the number of query heads that get ALiBi slopes; None for no ALiBi.
    dropout: on the probabilities, in training only.

    forward(q (B, T, H, K), k (B, S, G, K), v (B, S, G, K), *, sinks=None, key_padding_mask=None, seq_idx=None)
    → (B, T, H, K).
    """

    def __init__(
        self,
        *,
        causal: bool = False,
        window: int | None = None,
        alibi_heads: int | None = None,
        scale: float | None = None,
        softcap: float | None = None,
        dropout: float = 0.0,
        chunk_size: int | None = None,
    ) -> None:
        super().__init__()
        if window is not None and window < 1:
            raise ValueError(f"window={window} must be at least 1; None is no window")
        if not 0 <= dropout < 1:
            raise ValueError(f"dropout={dropout} must lie in [0, 1)")
        self.causal, self.window, self.alibi_heads = causal, window, alibi_heads
        self.scale, self.softcap, self.dropout, self.chunk_size = scale, softcap, dropout, chunk_size

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        sinks: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        seq_idx: Tensor | None = None,
    ) -> Tensor:
        # Computed here and not kept as a buffer: a model built on the meta device would lose it.
        slopes = None if self.alibi_heads is None else alibi_slopes(self.alibi_heads).to(q.device)
        return flash_attention(
            q,
            k,
            v,
            causal=self.causal,
            window=self.window,
            alibi_slopes=slopes,
            scale=self.scale,
            softcap=self.softcap,
            sinks=sinks,
            key_padding_mask=key_padding_mask,
            seq_idx=seq_idx,
            dropout_p=self.dropout if self.training else 0.0,
            chunk_size=self.chunk_size,
        )

    def extra_repr(self) -> str:
        shown = {name: getattr(self, name) for name in ("causal", "window", "alibi_heads", "softcap", "dropout")}
        return ", ".join(f"{name}={value}" for name, value in shown.items() if value not in (None, False, 0.0))


class GroupedQueryAttention(nn.Module):
    """Self-attention in which `num_kv_heads` key/value heads serve `num_heads` query heads (arXiv 2305.13245).

    dim: D. num_kv_heads: G, by default H. head_dim: K, by default D / H.
    position: "rope", a built `RotaryEmbedding`, "alibi", or None.
    window:   a query sees itself and the window − 1 keys before it (and, without `causal`, as many after).
    qk_norm:  RMSNorm over each head of q and k before the rotation (as in Qwen3).
    gate:     the output is multiplied by sigmoid of a projection of x, before the last projection (arXiv 2505.06708).
    sinks:    a learned logit per head joins the softmax's denominator (as in gpt-oss).
    dropout:  on the probabilities, in training only.
    bias:     of all projections; output_bias: of the last one, where it differs (as in Qwen2).

    forward(x (B, T, D), *, cache, attention_mask, position_ids, seq_idx) → (B, T, D), where with P tokens in the cache
      cache:          `LayerCache` or a layer of transformers' cache; None for none
      attention_mask: (B, P + T), true or nonzero for a token that counts
      position_ids:   (T,), (1, T) or (B, T); by default P … P + T − 1
      seq_idx:        (B, P + T), the document of each token; documents do not see each other

    Raises ValueError for head counts and shapes that do not fit, and for a cache of a narrower window.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        position: str | RotaryEmbedding | None = "rope",
        window: int | None = None,
        causal: bool = True,
        qk_norm: bool = False,
        gate: bool = False,
        sinks: bool = False,
        dropout: float = 0.0,
        bias: bool = False,
        output_bias: bool | None = None,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        head_dim = resolve_head_dim(dim, num_heads, num_kv_heads, head_dim)
        if isinstance(position, str) and position not in ("rope", "alibi"):
            raise ValueError(f"position={position!r} must be 'rope', 'alibi', a RotaryEmbedding or None")
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.q_proj = Linear(dim, num_heads * head_dim, bias=bias)
        self.k_proj = Linear(dim, num_kv_heads * head_dim, bias=bias)
        self.v_proj = Linear(dim, num_kv_heads * head_dim, bias=bias)
        self.o_proj = Linear(num_heads * head_dim, dim, bias=bias if output_bias is None else output_bias)
        self.q_norm = RMSNorm(head_dim) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(head_dim) if qk_norm else nn.Identity()
        self.gate_proj = Linear(dim, num_heads * head_dim, bias=bias) if gate else None
        self.sinks = nn.Parameter(torch.zeros(num_heads)) if sinks else None
        self.rotary = position if isinstance(position, RotaryEmbedding) else None
        if position == "rope":
            self.rotary = RotaryEmbedding(head_dim)
        alibi_heads = num_heads if position == "alibi" else None
        self.attention = FlashAttention(causal=causal, window=window, alibi_heads=alibi_heads, dropout=dropout)

    def forward(
        self,
        x: Tensor,
        *,
        cache: KeyValueCache | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        seq_idx: Tensor | None = None,
    ) -> Tensor:
        past = 0 if cache is None else cache.get_seq_length()
        check_window(cache, self.attention.window)
        check_covers("attention_mask", attention_mask, x, past)
        check_covers("seq_idx", seq_idx, x, past)
        q_BTHK = self.q_norm(self.q_proj(x).unflatten(-1, (self.num_heads, self.head_dim)))
        k_BTGK = self.k_norm(self.k_proj(x).unflatten(-1, (self.num_kv_heads, self.head_dim)))
        v_BTGK = self.v_proj(x).unflatten(-1, (self.num_kv_heads, self.head_dim))
        if self.rotary is not None:
            if position_ids is None:
                position_ids = torch.arange(past, past + x.shape[1], device=x.device)
            elif position_ids.ndim == 2 and position_ids.shape[0] == 1:
                position_ids = position_ids[0]  # as transformers gives positions that all rows share
            cos, sin = self.rotary(position_ids, torch.promote_types(x.dtype, torch.float32))
            q_BTHK, k_BTGK = apply_rotary(q_BTHK, cos, sin), apply_rotary(k_BTGK, cos, sin)

        k_BSGK, v_BSGK = extend(cache, k_BTGK, v_BTGK)
        # A windowed cache holds fewer keys than there are tokens: the masks' last S columns are theirs.
        length = k_BSGK.shape[1]
        attended_BTHK = self.attention(
            q_BTHK,
            k_BSGK,
            v_BSGK,
            sinks=self.sinks,
            key_padding_mask=None if attention_mask is None else attention_mask.bool()[:, -length:],
            seq_idx=None if seq_idx is None else seq_idx[:, -length:],
        )
        attended = attended_BTHK.flatten(2)
        if self.gate_proj is not None:
            attended = attended * torch.sigmoid(self.gate_proj(x))
        return self.o_proj(attended)


def resolve_head_dim(dim: int, num_heads: int, num_kv_heads: int, head_dim: int | None) -> int:
    """The head width, by default dim / num_heads; raises ValueError for head counts that do not fit."""
    if num_heads < 1 or num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(f"num_heads={num_heads} must be a positive multiple of num_kv_heads={num_kv_heads}")
    if head_dim is None and dim % num_heads:
        raise ValueError(f"dim={dim} must be a multiple of num_heads={num_heads}, or head_dim must be given")
    return dim // num_heads if head_dim is None else head_dim


def check_window(cache: Any, window: int | None) -> None:
    """Raise ValueError where the cache drops keys that the attention's window still sees."""
    kept = getattr(cache, "window", None) or getattr(cache, "sliding_window", None)
    if kept is not None and (window is None or kept < window):
        raise ValueError(f"the cache keeps a window of {kept} tokens, and the attention has window={window}")


def check_covers(name: str, mask: Tensor | None, x_BTD: Tensor, past: int) -> None:
    """Raise ValueError unless `mask` has one column for each token of the cache and of x."""
    expected = (x_BTD.shape[0], past + x_BTD.shape[1])
    if mask is not None and (mask.ndim != 2 or mask.shape[0] != expected[0] or mask.shape[1] != expected[1]):
        raise ValueError(
            f"{name} has shape {tuple(mask.shape)}; expected (B, P + T) = {expected}: one column for each of the "
            f"P={past} tokens in the cache and the T={x_BTD.shape[1]} of x"
        )


def extend(cache: Any, k_BTGK: Tensor, v_BTGK: Tensor) -> tuple[Tensor, Tensor]:
    """Append to the cache, whose layout is (B, G, S, K); return all keys and values as (B, S, G, K)."""
    if cache is None:
        return k_BTGK, v_BTGK
    k_BGSK, v_BGSK = cache.update(k_BTGK.transpose(1, 2), v_BTGK.transpose(1, 2))
    return k_BGSK.transpose(1, 2), v_BGSK.transpose(1, 2)
