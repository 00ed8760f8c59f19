"""Running the laws on a mixer."""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from neural_layers.cache import LayerCache
from neural_layers.testing.laws import LAWS
from neural_layers.testing.subject import Subject

# A mixer is some ten roundings deep: three projections, a normalisation, a sum over the past, a gate.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 2e-5}


@dataclass(frozen=True)
class LawResult:
    """One law: the largest relative deviation found, the one allowed, and what was raised, if anything."""

    law: str
    error: float
    tolerance: float
    raised: str = ""

    @property
    def passed(self) -> bool:
        return not self.raised and self.error <= self.tolerance


@dataclass(frozen=True)
class LawReport:
    """The results of `check_mixer`; printing it shows a line for each law."""

    mixer: str
    results: tuple[LawResult, ...]

    @property
    def passed(self) -> bool:
        return all(result.passed for result in self.results)

    @property
    def failed(self) -> tuple[str, ...]:
        """The names of the laws that do not hold."""
        return tuple(result.law for result in self.results if not result.passed)

    def __str__(self) -> str:
        lines = [f"{self.mixer}: {'all laws hold' if self.passed else 'broken: ' + ', '.join(self.failed)}"]
        for r in self.results:
            what = r.raised or f"error {r.error:.1e} (allowed {r.tolerance:.0e})"
            lines.append(f"  {'ok    ' if r.passed else 'BROKEN'} {r.law:<18} {what}")
        return "\n".join(lines)


def check_mixer(
    module: nn.Module,
    laws: str | Iterable[str] = "all",
    dtype: torch.dtype = torch.float64,
    *,
    dim: int | None = None,
    length: int = 9,
    seed: int = 0,
    make_cache: Callable[[], Any] = LayerCache,
) -> LawReport:
    """Run the laws of a sequence mixer on a copy of `module`, and report which hold.

    module:     anything with a mixer's face, `forward(x, *, cache, attention_mask, position_ids, seq_idx)`; it is
                copied to `dtype`, put in evaluation mode, and its weights are moved a little by `seed`, so that zeros
                and ones of an initialisation hide nothing
    laws:       "all", or names from `LAWS`: `chunked`, `packed`, `packed_chunked`, `left_padding`, `padded_chunked`,
                `causality`, `recomputed`, `finite_differences`, `state_gradient`, `beam_reorder`, `save_load`,
                `reference`
    dtype:      torch.float64 or torch.float32
    dim:        the width of x; by default that of the first linear layer
    length:     T, at least 1
    make_cache: makes an empty cache for one layer

    A law that raises counts as broken, and the report tells what was raised.
    Raises ValueError for an unknown law, a dtype without a tolerance, or a width that cannot be found.
    """
    names = list(LAWS) if laws == "all" else [laws] if isinstance(laws, str) else list(laws)
    unknown = [name for name in names if name not in LAWS]
    if unknown:
        raise ValueError(f"there is no law {unknown[0]!r}; there are {', '.join(LAWS)}")
    if dtype not in TOLERANCE:
        raise ValueError(f"dtype={dtype} has no tolerance; expected one of {', '.join(map(str, TOLERANCE))}")
    if length < 1:
        raise ValueError(f"length={length} must be at least 1")
    dim = _width(module) if dim is None else dim
    return LawReport(
        type(module).__name__,
        tuple(_run(name, module, dtype, (2, length, dim), seed, make_cache) for name in names),
    )


def _run(
    name: str,
    module: nn.Module,
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    seed: int,
    make_cache: Callable[[], Any],
) -> LawResult:
    generator = torch.Generator().manual_seed(seed)
    mixer = copy.deepcopy(module).to(dtype).eval()
    with torch.no_grad():
        for p in mixer.parameters():
            p.add_(0.1 * torch.randn(p.shape, dtype=torch.float64, generator=generator).to(dtype))
    x = torch.randn(*shape, dtype=torch.float64, generator=generator).to(dtype)
    try:
        error = LAWS[name](Subject(mixer, x, make_cache, generator))
    # Whatever a stranger's mixer raises is the finding.
    except Exception as exception:
        return LawResult(name, float("inf"), TOLERANCE[dtype], f"{type(exception).__name__}: {exception}")
    return LawResult(name, error, TOLERANCE[dtype])


def _width(module: nn.Module) -> int:
    for part in module.modules():
        if isinstance(part, nn.Linear):
            return part.in_features
    raise ValueError(f"{type(module).__name__} has no linear layer to take its width from; give dim=")
