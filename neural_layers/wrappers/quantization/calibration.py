"""The ranges of layers' inputs, measured on data, for 8-bit static quantization (arXiv 1712.05877, 2004.09602)."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from neural_layers.errors import InputError

OBSERVERS = ("minmax", "percentile", "mse")
BINS = 4096
QUANTILE = 0.9999
_STEPS = 255


class InputHistogram:
    """How often the values of a layer's input occur: least, largest, and counts in equal bins over ±edge.

    edge is a power of two; where a value lies beyond it, neighbouring bins are merged and it doubles, so that the
    counts are those of one pass over all values with the last edge.
    """

    def __init__(self) -> None:
        self.low, self.high, self.edge = torch.inf, -torch.inf, 0.0
        self.counts = torch.zeros(BINS, dtype=torch.float64)

    def add(self, x: Tensor) -> None:
        """Count the values of x. Raises ValueError for NaN and infinity."""
        if not x.numel():
            return
        x = x.detach().float().flatten()
        low, high = (bound.item() for bound in x.aminmax())
        if not -torch.inf < low <= high < torch.inf:
            raise ValueError("its input holds NaN or infinity")
        self.low, self.high = min(self.low, low), max(self.high, high)
        self._widen(max(abs(low), abs(high)))
        self.counts += torch.histc(x, BINS, -self.edge, self.edge).double().cpu()

    def _widen(self, largest: float) -> None:
        if self.edge == 0:
            self.edge = 2.0**-100
        while self.edge < largest:
            half = self.counts.view(-1, 2).sum(dim=1)
            self.counts = torch.nn.functional.pad(half, (BINS // 4, BINS // 4))
            self.edge *= 2

    def quantile(self, share: float) -> tuple[float, float]:
        """The range that leaves out (1 − share) / 2 of the values on each side, to the border of a bin."""
        below = self.counts.cumsum(0) / self.counts.sum()
        outside = (1 - share) / 2
        first = int((below <= outside).sum())
        last = int((below < 1 - outside).sum())
        width = 2 * self.edge / BINS
        return max(self.low, first * width - self.edge), min(self.high, (last + 1) * width - self.edge)

    def least_error(self, ratios: int = 64) -> tuple[float, float]:
        """Of the ranges [r · low, r · high], r = 1/ratios … 1, the one of the least squared error of rounding."""
        width = 2 * self.edge / BINS
        value = (torch.arange(BINS, dtype=torch.float64) + 0.5) * width - self.edge
        counts, value = self.counts[self.counts > 0], value[self.counts > 0]
        errors = []
        for i in range(1, ratios + 1):
            scale, zero_point = affine(self.low * i / ratios, self.high * i / ratios)
            code = (value / scale).round().add(zero_point).clamp(0, _STEPS)
            errors.append(float((counts * (scale * (code - zero_point) - value) ** 2).sum()))
        best = (ratios - errors[::-1].index(min(errors))) / ratios
        return self.low * best, self.high * best


def affine(low: float, high: float) -> tuple[float, int]:
    """Scale and zero point of the codes 0 … 255 over a range, widened to hold 0, which gets a code of its own."""
    low, high = min(low, 0.0), max(high, 0.0)
    scale = (high - low) / _STEPS
    if scale < torch.finfo(torch.float32).tiny:
        return 1.0, 0  # all zeros
    return scale, max(0, min(_STEPS, round(-low / scale)))


# "minmax": from the least to the largest value. "percentile": without the 0.005 % of values at each end. "mse": the
# range whose rounding has the least squared error.
_RANGES: dict[str, Callable[[InputHistogram], tuple[float, float]]] = {
    "minmax": lambda seen: (seen.low, seen.high),
    "percentile": lambda seen: seen.quantile(QUANTILE),
    "mse": lambda seen: seen.least_error(),
}


@torch.no_grad()
def input_ranges(
    model: nn.Module, names: list[str], batches: Iterable[Any], observer: str
) -> dict[str, tuple[float, int]]:
    """Scale and zero point of the input of each layer in `names`, over all `batches`.

    The model runs in evaluation mode and is left in its own. Raises InputError where there is no batch, the model
    refuses one, a layer is not reached, or its input is not finite.
    """
    seen = {name: InputHistogram() for name in names}
    with ExitStack() as stack:
        stack.enter_context(_evaluating(model))
        for name in names:
            hook = model.get_submodule(name).register_forward_pre_hook(_watcher(name, seen[name]), with_kwargs=True)
            stack.callback(hook.remove)
        count = 0
        for batch in each("calibration", batches):
            feed(model, batch, f"calibration batch {count}")
            count += 1
    if not count:
        raise InputError("calibration has no batch; give at least one (an iterator is empty once it was read)")
    missed = [name for name, histogram in seen.items() if histogram.low > histogram.high]
    if missed:
        more = f" and {len(missed) - 3} more" if len(missed) > 3 else ""
        raise InputError(
            f"the calibration data never reached {', '.join(missed[:3])}{more}; give batches that use them, or exclude "
            "them"
        )
    return {name: affine(*_RANGES[observer](histogram)) for name, histogram in seen.items()}


class _NotFinite(InputError):
    pass


def _watcher(name: str, histogram: InputHistogram) -> Callable[..., None]:
    def watch(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        try:
            histogram.add(args[0] if args else kwargs["input"])
        except ValueError as problem:
            raise _NotFinite(f"{name}: {problem}; calibrate with a model and data that stay finite") from problem

    return watch


def each(name: str, batches: Iterable[Any]) -> Iterable[Any]:
    """The batches themselves. Raises InputError for a single one, whose rows or names would count as batches."""
    if isinstance(batches, (Tensor, Mapping, str)):
        raise InputError(f"{name} is one {type(batches).__name__}; give an iterable of batches, such as [{name}]")
    if not isinstance(batches, Iterable):
        raise InputError(f"{name} is a {type(batches).__name__}; give an iterable of batches")
    return batches


def feed(model: nn.Module, batch: Any, what: str = "the batch") -> Any:
    """`model(**batch)` for a dict, `model(*batch)` for a tuple or list, otherwise `model(batch)`.

    Raises InputError, with the batch's shapes and what the model says, where it refuses the batch.
    """
    try:
        if isinstance(batch, Mapping):
            return model(**batch)
        return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)
    except _NotFinite:
        raise
    except Exception as problem:  # what a model says of a wrong batch is its own affair
        said = " ".join(str(problem).split()) or type(problem).__name__
        raise InputError(f"{what} ({_shapes(batch)}): the model refuses it: {said}") from problem


def _shapes(batch: Any) -> str:
    if isinstance(batch, Tensor):
        return f"{tuple(batch.shape)} {str(batch.dtype).removeprefix('torch.')} on {batch.device}"
    if isinstance(batch, Mapping):
        return ", ".join(f"{name} {_shapes(value)}" for name, value in batch.items())
    if isinstance(batch, (tuple, list)):
        return ", ".join(map(_shapes, batch))
    return type(batch).__name__


@contextmanager
def _evaluating(model: nn.Module) -> Any:
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode
