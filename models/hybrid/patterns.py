"""Which mixer each layer has: the usual patterns, as lists for `HybridConfig(mixers=…)`."""

from typing import Any

MIXERS = ("mamba", "mamba2", "attention", "sliding_attention")
# fmt: off
MAMBA2_OPTIONS = frozenset((
    "state_dim", "head_dim", "num_groups", "conv_width", "norm_eps", "inner_dim", "bias", "output_bias", "conv_bias",
    "activation", "norm", "bc_norm", "rotary", "step_limit",
))
# fmt: on


def attention_every(num_layers: int, k: int = 4, mixer: str = "mamba") -> list[str]:
    """Layers k, 2k, 3k … are full attention, the others `mixer` (Jamba, arXiv 2403.19887, has one in eight)."""
    if k < 1:
        raise ValueError(f"k={k} must be at least 1: every k-th layer is attention")
    return ["attention" if i % k == 0 else mixer for i in range(1, num_layers + 1)]


def samba(num_layers: int, mixer: str = "mamba") -> list[str]:
    """`mixer` and windowed attention in turns (Samba, arXiv 2406.07522)."""
    return [("sliding_attention" if i % 2 else mixer) for i in range(num_layers)]


def pure(num_layers: int, mixer: str) -> list[str]:
    """The same mixer in every layer."""
    return [mixer] * num_layers


def check_mixers(mixers: list[str], num_layers: int) -> None:
    """Raise ValueError unless there is one known mixer for each layer."""
    unknown = [name for name in mixers if name not in MIXERS]
    if unknown:
        raise ValueError(f"mixers holds {unknown[0]!r}; known are {', '.join(MIXERS)}")
    if len(mixers) != num_layers:
        raise ValueError(f"mixers names {len(mixers)} layers, but num_hidden_layers={num_layers}")


def check_options(options: dict[str, dict[str, Any]], mixers: list[str]) -> None:
    """Raise ValueError unless `options` names "mamba2" layers and arguments of `Mamba2`: state_dim, head_dim,
    num_groups, conv_width, norm_eps, inner_dim, bias, output_bias, conv_bias, activation, norm, bc_norm, step_limit,
    and rotary as True (the model's rotary embedding) or False."""
    for layer, given in options.items():
        if not layer.isdecimal() or int(layer) >= len(mixers) or mixers[int(layer)] != "mamba2":
            raise ValueError(f"mamba2_layers holds layer {layer!r}, which is none of the {len(mixers)} with 'mamba2'")
        unknown = sorted(set(given) - MAMBA2_OPTIONS)
        if unknown:
            raise ValueError(f"mamba2_layers[{layer!r}] holds {unknown[0]!r}; known are {sorted(MAMBA2_OPTIONS)}")
