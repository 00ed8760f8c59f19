"""Attention from one sequence to another.

Letters: B batch, T query length, S context length, D width, H query heads, G key/value heads, K head width.
"""

from typing import Any

from torch import Tensor, nn

from neural_layers.attention import FlashAttention, extend, resolve_head_dim
from neural_layers.kernels.arguments import match_shapes
from neural_layers.linear import Linear


class CrossAttention(nn.Module):
    """Attention whose keys and values come from a context of its own length and width.

    dim: D. context_dim: the context's width, by default D. num_kv_heads: G, by default H. head_dim: by default D / H.
    dropout: on the probabilities, in training only.

    forward(x (B, T, D), context (B, S, context_dim), *, context_mask (B, S), cache) → (B, T, D).
      context_mask: true or nonzero for a token of the context that counts; a row without any gives zeros
                    (times the last projection).
      cache:        keys and values of the context are projected on the first call and kept there; later calls take
                    them from it, and then `context` may be None.

    Raises ValueError for head counts and shapes that do not fit, and where neither context nor filled cache is given.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        *,
        context_dim: int | None = None,
        dropout: float = 0.0,
        bias: bool = False,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        context_dim = dim if context_dim is None else context_dim
        head_dim = resolve_head_dim(dim, num_heads, num_kv_heads, head_dim)
        self.num_heads, self.num_kv_heads, self.head_dim = num_heads, num_kv_heads, head_dim
        self.q_proj = Linear(dim, num_heads * head_dim, bias=bias)
        self.k_proj = Linear(context_dim, num_kv_heads * head_dim, bias=bias)
        self.v_proj = Linear(context_dim, num_kv_heads * head_dim, bias=bias)
        self.o_proj = Linear(num_heads * head_dim, dim, bias=bias)
        self.attention = FlashAttention(dropout=dropout)

    def forward(
        self, x: Tensor, context: Tensor | None = None, *, context_mask: Tensor | None = None, cache: Any = None
    ) -> Tensor:
        q_BTHK = self.q_proj(x).unflatten(-1, (self.num_heads, self.head_dim))
        k_BSGK, v_BSGK = self._keys_values(context, cache)
        match_shapes({"B": x.shape[0], "S": k_BSGK.shape[1]}, "BS", context_mask=context_mask)
        padding = None if context_mask is None else context_mask.bool()
        return self.o_proj(self.attention(q_BTHK, k_BSGK, v_BSGK, key_padding_mask=padding).flatten(2))

    def _keys_values(self, context: Tensor | None, cache: Any) -> tuple[Tensor, Tensor]:
        if cache is not None and cache.get_seq_length() > 0:
            return cache.keys.transpose(1, 2), cache.values.transpose(1, 2)
        if context is None:
            raise ValueError("cross-attention needs `context`, or a cache filled by an earlier call")
        k_BSGK = self.k_proj(context).unflatten(-1, (self.num_kv_heads, self.head_dim))
        v_BSGK = self.v_proj(context).unflatten(-1, (self.num_kv_heads, self.head_dim))
        return extend(cache, k_BSGK, v_BSGK)
