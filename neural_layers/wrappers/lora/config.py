"""What an adapter of a model is to be."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from neural_layers.errors import InputError
from neural_layers.wrappers.modules import matches

ALL_LINEAR = "all-linear"


@dataclass(frozen=True)
class LoRAConfig:
    """Low-rank adapters (arXiv 2106.09685): W + ΔW with ΔW = s·B·A, where A is (r, inputs) and B (outputs, r).

    r:              the rank, at most that of the layer: min(inputs, outputs)
    alpha:          s = alpha / r, or alpha / √r where `use_rslora` (arXiv 2312.03732)
    dropout:        of the inputs that the adapter sees, in training
    target_modules: "all-linear" (every linear layer but the output head), or patterns of module names, each as
                    `wrappers.modules.matches` takes it: the last parts of a name, a whole name, a glob, "re:…".
                    Linear layers, also quantized ones, embeddings and Conv1d can be named
    rank_pattern, alpha_pattern: r and alpha for the modules whose names match a pattern; the first that matches counts
    use_dora:       DoRA (arXiv 2402.09353): m · (W + ΔW) / ‖W + ΔW‖, with a trained magnitude m for each output (for an
                    embedding, each dimension) and the norm held constant in the gradient
    layers:         the indices of the layers that get adapters, the first number in a module's name; None for all

    Raises InputError (a ValueError) for values out of range.
    """

    r: int = 8
    alpha: float = 16
    dropout: float = 0.0
    target_modules: str | tuple[str, ...] = ("q_proj", "v_proj")
    rank_pattern: Mapping[str, int] = field(default_factory=dict)
    alpha_pattern: Mapping[str, float] = field(default_factory=dict)
    use_rslora: bool = False
    use_dora: bool = False
    layers: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        given = self.target_modules
        targets: str | tuple[str, ...] = given if given == ALL_LINEAR else (given,) if isinstance(given, str) else ()
        if not isinstance(given, str):
            targets = tuple(given)
        layers = (self.layers,) if isinstance(self.layers, int) else self.layers
        object.__setattr__(self, "target_modules", targets)
        object.__setattr__(self, "layers", None if layers is None else tuple(layers))
        object.__setattr__(self, "rank_pattern", dict(self.rank_pattern))
        object.__setattr__(self, "alpha_pattern", dict(self.alpha_pattern))
        self._check()

    def _check(self) -> None:
        for name, r in {"r": self.r, **self.rank_pattern}.items():
            if isinstance(r, bool) or not isinstance(r, int) or r < 1:
                told = "r" if name == "r" else f"rank_pattern[{name!r}]"
                raise InputError(f"{told}={r!r} must be a whole number of at least 1")
        for name, alpha in {"alpha": self.alpha, **self.alpha_pattern}.items():
            if not isinstance(alpha, int | float) or not 0 < alpha < math.inf:
                told = "alpha" if name == "alpha" else f"alpha_pattern[{name!r}]"
                raise InputError(f"{told}={alpha!r} must be a positive number; the scale is alpha / r")
        if not 0 <= self.dropout < 1:
            raise InputError(f"dropout={self.dropout!r} must lie in [0, 1)")
        if not self.target_modules or not all(isinstance(t, str) and t for t in self.target_modules):
            raise InputError(
                f"target_modules={self.target_modules!r} must be {ALL_LINEAR!r} or names of modules such as "
                "('q_proj', 'v_proj')"
            )
        patterns = () if self.target_modules == ALL_LINEAR else self.target_modules
        for pattern in (*patterns, *self.rank_pattern, *self.alpha_pattern):
            try:
                matches("", pattern)
            except ValueError as error:
                raise InputError(str(error)) from error
        if self.layers is not None and (not self.layers or any(i < 0 for i in self.layers)):
            raise InputError(f"layers={self.layers!r} must be indices from 0 on, at least one; None for all layers")

    def rank_of(self, name: str) -> int:
        """The rank of the module of this name."""
        return next((r for pattern, r in self.rank_pattern.items() if matches(name, pattern)), self.r)

    def alpha_of(self, name: str) -> float:
        """The alpha of the module of this name."""
        return next((alpha for pattern, alpha in self.alpha_pattern.items() if matches(name, pattern)), self.alpha)
