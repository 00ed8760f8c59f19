"""A block in a graph: residual branches around a mixer, a cross-attention and a feed-forward layer."""

from collections.abc import Callable
from typing import Any

from torch import nn

from neural_layers.attention import GroupedQueryAttention
from neural_layers.block import EnhancedBlock
from neural_layers.errors import InputError
from neural_layers.feed_forward import GeGLU, SwiGLU
from neural_layers.mamba import Mamba
from neural_layers.mamba2 import Mamba2
from neural_layers.models.export.attention import Shared, cross_attention, rms_norm, self_attention
from neural_layers.models.export.graph import Graph
from neural_layers.models.export.recurrent import mamba, mamba2, silu
from neural_layers.models.export.state import States
from neural_layers.models.export.weights import Weights, array
from neural_layers.norm import RMSNorm
from neural_layers.residual import LayerScale, PostNormResidual, PreNormResidual


def block(
    g: Graph,
    weights: Weights,
    module: EnhancedBlock,
    x: str,
    shared: Shared,
    states: States | None,
    context: tuple[tuple[str, str], str] | None = None,
) -> str:
    """All branches of a block: (B, T, D) → (B, T, D).

    states: None for a block without memory (an encoder's). context: keys and values of a cross-attention, and its bias.
    Raises InputError for a part that cannot be exported, by name.
    """

    branches: Any = module

    def mix(y: str) -> str:
        return _mixer(g, weights, branches.mixer.inner, y, shared, states)

    def attend(y: str) -> str:
        assert context is not None
        return cross_attention(g, weights, branches.cross_attention.inner, y, *context)

    def feed(y: str) -> str:
        return feed_forward(g, weights, branches.feed_forward.inner, y)

    for part, inner in ((module.mixer, mix), (module.cross_attention, attend), (module.feed_forward, feed)):
        if part is not None:
            x = _residual(g, weights, part, x, inner)
    return x


def _mixer(g: Graph, weights: Weights, mixer: nn.Module, x: str, shared: Shared, states: States | None) -> str:
    if type(mixer) is GroupedQueryAttention:
        _check_attention(mixer, has_state=states is not None)
        return self_attention(g, weights, mixer, x, shared, states)
    if states is not None and type(mixer) is Mamba:
        return mamba(g, weights, mixer, x, shared, states)
    if states is not None and type(mixer) is Mamba2:
        return mamba2(g, weights, mixer, x, shared, states)
    raise InputError(f"{_where(weights, mixer)} cannot be exported; mixers are GroupedQueryAttention, Mamba, Mamba2")


def _check_attention(mixer: GroupedQueryAttention, *, has_state: bool) -> None:
    for name, used in (("sinks", mixer.sinks is not None), ("softcap", mixer.attention.softcap is not None)):
        if used:
            raise InputError(f"attention with {name} cannot be exported; leave {name} out")
    if has_state and not mixer.attention.causal:
        raise InputError("attention with causal=False cannot be exported with a state; use causal=True")
    if not has_state and not mixer.attention.causal and (mixer.attention.window or mixer.attention.alibi_heads):
        raise InputError("an encoder's attention with window or ALiBi cannot be exported; use rope without window")


def feed_forward(g: Graph, weights: Weights, module: nn.Module, x: str) -> str:
    """down(act(gate(x)) · up(x))."""
    if type(module) not in (SwiGLU, GeGLU):
        raise InputError(f"{_where(weights, module)} cannot be exported; feed-forward layers are SwiGLU and GeGLU")
    layers: Any = module
    gate, up = weights.linears(g, x, layers.gate_proj, layers.up_proj)
    gate = silu(g, gate) if type(module) is SwiGLU else g.op("Gelu", gate, approximate="tanh")
    return weights.linear(g, g.op("Mul", gate, up), layers.down_proj)


def _residual(g: Graph, weights: Weights, part: nn.Module, x: str, inner: Callable[[str], str]) -> str:
    if type(part) not in (PreNormResidual, PostNormResidual) or not isinstance(part.norm, RMSNorm):
        raise InputError(f"{_where(weights, part)} cannot be exported; branches are residual with an RMSNorm")
    is_pre = type(part) is PreNormResidual
    y = inner(rms_norm(g, weights, part.norm, x) if is_pre else x)
    if isinstance(part.scale, LayerScale):
        y = g.op("Mul", y, g.weight(f"{weights.name(part.scale)}.gamma", array(part.scale.gamma)))
    y = g.op("Add", x, y)
    return y if is_pre else rms_norm(g, weights, part.norm, y)


def _where(weights: Weights, module: nn.Module) -> str:
    return f"{type(module).__name__} ({weights.name(module) or 'the model'})"
