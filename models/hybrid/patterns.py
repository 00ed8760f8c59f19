"""Which mixer each layer has: the usual patterns, as lists for `HybridConfig(mixers=…)`."""

MIXERS = ("mamba", "mamba2", "attention", "sliding_attention")


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
