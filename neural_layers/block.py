"""The transformer block in which every part is a slot."""

from typing import Any

from torch import Tensor, nn

from neural_layers.attention import GroupedQueryAttention
from neural_layers.feed_forward import SwiGLU
from neural_layers.norm import RMSNorm
from neural_layers.residual import LayerScale, PostNormResidual, PreNormResidual, StochasticDepth


class _Default(nn.Module):
    """Stands for a slot left out, because None means that the part is absent."""


DEFAULT = _Default()


class EnhancedBlock(nn.Module):
    """Residual branches around a mixer, an optional cross-attention and a feed-forward layer.

    dim: D. num_heads, num_kv_heads: of the default mixer.
    mixer:           any module with a mixer's face; by default `GroupedQueryAttention(dim, num_heads, num_kv_heads)`
    feed_forward:    any module (B, T, D) → (B, T, D); by default `SwiGLU(dim)`
    cross_attention: a `CrossAttention`, or None
    residual:        `PreNormResidual` or `PostNormResidual`
    layer_scale:     the initial value of a learned scale on each branch, or None for no scale
    drop_path:       the probability of stochastic depth on each branch
    dropout:         on the output of each branch
    norm_eps:        of the branches' RMSNorm

    A slot given as None is absent, and so is its branch.

    forward(x (B, T, D), *, cache, attention_mask, position_ids, seq_idx, context, context_mask, cross_cache)
    → (B, T, D). The first four go to the mixer, the others to the cross-attention.

    Raises ValueError where the default mixer is wanted without num_heads, heads are given for a mixer that is not the
    default, or `context` comes to a block without cross-attention; TypeError for an unknown keyword.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int | None = None,
        num_kv_heads: int | None = None,
        *,
        mixer: nn.Module | None = DEFAULT,
        feed_forward: nn.Module | None = DEFAULT,
        cross_attention: nn.Module | None = None,
        residual: type[PreNormResidual] | type[PostNormResidual] = PreNormResidual,
        layer_scale: float | None = None,
        drop_path: float = 0.0,
        dropout: float = 0.0,
        norm_eps: float = 1e-6,
    ) -> None:
        super().__init__()
        if mixer is DEFAULT:
            if num_heads is None:
                raise ValueError("EnhancedBlock needs num_heads for its default attention, or a `mixer`")
            mixer = GroupedQueryAttention(dim, num_heads, num_kv_heads)
        elif num_heads is not None or num_kv_heads is not None:
            raise ValueError(
                f"num_heads={num_heads} and num_kv_heads={num_kv_heads} belong to the default mixer; leave them out "
                "where `mixer` is given"
            )
        if feed_forward is DEFAULT:
            feed_forward = SwiGLU(dim)

        def branch(inner: nn.Module | None) -> nn.Module | None:
            if inner is None:
                return None
            scale = None if layer_scale is None else LayerScale(dim, layer_scale)
            drops = [nn.Dropout(dropout)] * (dropout > 0) + [StochasticDepth(drop_path)] * (drop_path > 0)
            # None and a single part stay bare: a container costs a decoding step as much as a small norm.
            drop = nn.Sequential(*drops) if len(drops) > 1 else next(iter(drops), None)
            return residual(RMSNorm(dim, norm_eps), inner, scale, drop)

        self.mixer = branch(mixer)
        self.cross_attention = branch(cross_attention)
        self.feed_forward = branch(feed_forward)

    def forward(
        self,
        x: Tensor,
        *,
        cache: Any = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        seq_idx: Tensor | None = None,
        context: Tensor | None = None,
        context_mask: Tensor | None = None,
        cross_cache: Any = None,
    ) -> Tensor:
        if self.mixer is not None:
            x = self.mixer(x, cache=cache, attention_mask=attention_mask, position_ids=position_ids, seq_idx=seq_idx)
        elif any(given is not None for given in (cache, attention_mask, position_ids, seq_idx)):
            raise ValueError("cache, attention_mask, position_ids and seq_idx need a mixer, and this block has none")
        if self.cross_attention is not None:
            x = self.cross_attention(x, context, context_mask=context_mask, cache=cross_cache)
        elif context is not None or context_mask is not None or cross_cache is not None:
            raise ValueError("context, context_mask and cross_cache need cross_attention=CrossAttention(...)")
        return x if self.feed_forward is None else self.feed_forward(x)
