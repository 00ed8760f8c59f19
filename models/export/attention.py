"""Attention in a graph, and what all its layers share: masks, ALiBi and the rotary tables.

Letters: B batch, T query length, S key length, H query heads, G key/value heads, K head width.
"""

from typing import Any

import numpy as np
import torch
from torch import nn

from neural_layers.attention import GroupedQueryAttention
from neural_layers.cross_attention import CrossAttention
from neural_layers.models.export.graph import END, Graph
from neural_layers.models.export.session import WINDOW
from neural_layers.models.export.state import States
from neural_layers.models.export.weights import Weights, array
from neural_layers.norm import RMSNorm
from neural_layers.position import RotaryEmbedding, alibi_slopes

FLOAT, INT64, BOOL, DOUBLE = 1, 7, 9, 11
# Finite: a query that sees nothing (padding) must not become NaN, which its keys would carry into later layers.
HIDDEN = -1e30


class Shared:
    """Values that layers share, each written once, when first asked for.

    ids (B, T), mask (B, S) int64 and, for rotary embeddings, positions (B, T) int64 are inputs of the graph.
    """

    def __init__(self, g: Graph, ids: str, mask: str, positions: str | None = None) -> None:
        self.g, self.mask, self.positions = g, mask, positions
        self.length, self.total = g.dim(ids, 1), g.dim(mask, 1)
        self._made: dict[Any, Any] = {}

    def kept(self) -> str:
        """1 for a token of the input that counts, 0 for padding: float32 (B, T, 1)."""

        def make() -> str:
            g = self.g
            here = g.op("Slice", self.mask, g.op("Sub", self.total, self.length), [END], [1])
            return g.op("Unsqueeze", g.op("Cast", here, to=FLOAT), [2])

        return self._once("kept", make)

    def padding_bias(self, mask: str) -> str:
        """What is added to scores where only padding is hidden, by a mask (B, S) of the keys: (B, 1, T, S)."""

        def make() -> str:
            g = self.g
            seen = g.op("Unsqueeze", g.op("Cast", mask, to=BOOL), [1, 2])
            # Spelled out for each query: ONNX Runtime's Attention does not broadcast that dimension.
            return g.op("Expand", g.op("Where", seen, 0.0, HIDDEN), g.concat([1, 1], self.length, [1]))

        return self._once(("padding", mask), make)

    def causal_bias(self, window: int | None, alibi_heads: int | None) -> str:
        """What is added to scores: HIDDEN for keys after the query, beyond the window or padding, else ALiBi or 0.

        (B, 1, T, S), or (B, H, T, S) with ALiBi.
        """

        def make() -> str:
            g, distance = self.g, self._distance()
            seen = g.op("GreaterOrEqual", distance, 0)
            if window is not None:
                seen = g.op("And", seen, g.op("Less", distance, window))
            seen = g.op("And", seen, g.op("Unsqueeze", g.op("Cast", self.mask, to=BOOL), [1, 2]))
            if alibi_heads is None:
                return g.op("Where", seen, 0.0, HIDDEN)
            slopes = -alibi_slopes(alibi_heads).numpy().reshape(-1, 1, 1)
            return g.op("Where", seen, g.op("Mul", g.op("Cast", distance, to=FLOAT), slopes), HIDDEN)

        return self._once(("causal", window, alibi_heads), make)

    def rotary(self, rotary: RotaryEmbedding) -> tuple[str, str]:
        """cos and sin, (B, T, K/2): computed in float64 as the module does, so that far positions keep their digits,
        and without a table, so that no length is built in."""
        key = ("rotary", rotary.head_dim, rotary.base, str(rotary.scaling))

        def make() -> tuple[str, str]:
            g = self.g
            position = g.op("Cast", self.positions, to=DOUBLE)
            if rotary.scaling is not None and rotary.scaling["rope_type"] == "dynamic":
                frequency: Any = self._dynamic(rotary, position)
            else:
                frequency = rotary._frequencies(torch.zeros(1, 1, dtype=torch.float64)).numpy()
            angle = g.op("Mul", g.op("Unsqueeze", position, [2]), frequency)
            factor = np.array(rotary._attention_factor())
            cos, sin = (g.op("Cast", g.op("Mul", g.op(f, angle), factor), to=FLOAT) for f in ("Cos", "Sin"))
            return cos, sin

        made: tuple[str, str] = self._once(key, make)
        return made

    def _dynamic(self, rotary: RotaryEmbedding, position: str) -> str:
        """The frequencies of dynamic NTK, which follow from the longest position of the call."""
        g, s, k = self.g, rotary.scaling or {}, rotary.head_dim
        factor, original = float(s["factor"]), float(s["original_max_position_embeddings"])
        last = g.op("Add", g.op("ReduceMax", position, keepdims=0), np.array(1.0))
        length = g.op("Max", last, np.array(original))
        growth = g.op("Sub", g.op("Mul", length, np.array(factor / original)), np.array(factor - 1))
        base = g.op("Mul", g.op("Pow", growth, np.array(k / (k - 2))), np.array(float(rotary.base)))
        return g.op("Pow", base, -np.arange(0, k, 2, dtype=np.float64) / k)

    def _distance(self) -> str:
        """How far each key lies before each query, (T, S) int64."""

        def make() -> str:
            g = self.g
            keys = g.op("Range", 0, g.op("Squeeze", self.total, [0]), 1)
            queries = g.op("Slice", keys, g.op("Sub", self.total, self.length), [END], [0])
            return g.op("Sub", g.op("Unsqueeze", queries, [1]), keys)

        return self._once("distance", make)

    def _once(self, key: Any, make: Any) -> Any:
        if key not in self._made:
            self._made[key] = make()
        return self._made[key]


def rms_norm(g: Graph, weights: Weights, norm: RMSNorm, x: str) -> str:
    """x / sqrt(mean(x²) + ε) · weight over the last dimension."""
    weight = g.weight(f"{weights.name(norm)}.weight", array(norm.weight))
    return g.op("RMSNormalization", x, weight, axis=-1, epsilon=norm.eps)


def self_attention(
    g: Graph, weights: Weights, mixer: GroupedQueryAttention, x: str, shared: Shared, states: States | None
) -> str:
    """Grouped-query attention; keys and values (B, G, S, K) go on in `states` where there are any."""
    heads, groups, k = mixer.num_heads, mixer.num_kv_heads, mixer.head_dim
    layers = (mixer.q_proj, mixer.k_proj, mixer.v_proj)
    gates = () if mixer.gate_proj is None else (mixer.gate_proj,)
    parts = weights.linears(g, x, *layers, *gates)
    q, key, value = parts[:3]
    q = head_norm(g, weights, mixer.q_norm, q, heads * k, k)
    key = head_norm(g, weights, mixer.k_norm, key, groups * k, k)
    if mixer.rotary is not None:
        cos, sin = shared.rotary(mixer.rotary)
        q = g.op("RotaryEmbedding", q, cos, sin, num_heads=heads)
        key = g.op("RotaryEmbedding", key, cos, sin, num_heads=groups)
    window = mixer.attention.window
    counts: dict[str, Any] = {"q_num_heads": heads, "kv_num_heads": groups}
    alibi = mixer.attention.alibi_heads
    if states is None:
        bias = shared.causal_bias(window, alibi) if mixer.attention.causal else shared.padding_bias(shared.mask)
        y = g.op("Attention", q, key, value, bias, **counts)
    else:
        dims = ("past", "total") if window is None else (f"{WINDOW}{window}", f"kept_of_{window}")
        past = [states.take(kind, (groups, dims[0], k), dim=dims[1], window=window) for kind in ("keys", "values")]
        bias = shared.causal_bias(window, alibi)
        if window is not None:  # of the bias for all tokens, the columns of the keys that are left
            seen = g.op("Add", g.dim(past[0], 2), shared.length)
            bias = g.op("Slice", bias, g.op("Sub", shared.total, seen), [END], [3])
        y, *new = g.ops("Attention", q, key, value, bias, *past, count=3, **counts)
        for tensor in new:
            states.give(tensor if window is None else g.tail(tensor, window - 1, 2))
    if gates:
        y = g.op("Mul", y, g.op("Sigmoid", parts[3]))
    return weights.linear(g, y, mixer.o_proj)


def head_norm(g: Graph, weights: Weights, norm: nn.Module, x: str, width: int, k: int) -> str:
    """RMSNorm of each head of width k by itself, or x where there is none."""
    if not isinstance(norm, RMSNorm):
        return x
    heads = g.op("Reshape", x, [0, 0, width // k, k])
    return g.op("Reshape", rms_norm(g, weights, norm, heads), [0, 0, width])


def context_keys(g: Graph, weights: Weights, cross: CrossAttention, context: str) -> list[str]:
    """Keys and values of a cross-attention's context, (B, G, S, K) each."""
    groups, k = cross.num_kv_heads, cross.head_dim
    both = weights.linears(g, context, cross.k_proj, cross.v_proj)
    return [g.op("Transpose", g.op("Reshape", part, [0, 0, groups, k]), perm=[0, 2, 1, 3]) for part in both]


def cross_attention(
    g: Graph, weights: Weights, cross: CrossAttention, x: str, keys_values: tuple[str, str], bias: str
) -> str:
    """Attention to keys and values of `context_keys`; bias (B, 1, T, S) hides the context's padding."""
    q = g.op("Reshape", weights.linear(g, x, cross.q_proj), [0, 0, cross.num_heads, cross.head_dim])
    y = g.op("Attention", g.op("Transpose", q, perm=[0, 2, 1, 3]), *keys_values, bias)
    y = g.op("Reshape", g.op("Transpose", y, perm=[0, 2, 1, 3]), [0, 0, cross.num_heads * cross.head_dim])
    return weights.linear(g, y, cross.o_proj)
