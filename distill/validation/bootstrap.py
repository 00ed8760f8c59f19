"""Is one model better than another, or was it this sample of sentences? Paired bootstrap resampling (Koehn 2004)."""

from collections.abc import Iterator
from dataclasses import asdict, dataclass

import numpy as np

from neural_layers.distill.validation.measures import Array, Measure

_COUNTS_AT_ONCE = 2_000_000


@dataclass(frozen=True)
class Comparison:
    """Two models on the same examples.

    value, reference: the scores of the one compared and of the one that it is compared with
    difference:       value − reference
    low, high:        the interval of the difference, by the quantiles of the samples
    samples:          how many there were
    better, worse:    the shares of them in which `value` was better and worse, by the direction of the metric
    higher_is_better: that direction
    """

    value: float
    reference: float
    difference: float
    low: float
    high: float
    samples: int
    better: float
    worse: float
    higher_is_better: bool = True

    @property
    def is_worse(self) -> bool:
        """Whether the whole interval lies on the side of worse."""
        return self.high < 0 if self.higher_is_better else self.low > 0

    @property
    def is_better(self) -> bool:
        """Whether the whole interval lies on the side of better."""
        return self.low > 0 if self.higher_is_better else self.high < 0

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def paired_bootstrap(
    current: Measure, reference: Measure, *, samples: int = 1000, confidence: float = 0.95, seed: int = 0
) -> Comparison:
    """Compare two models on `samples` test sets, each drawn with replacement from the examples, the same for both.

    Koehn (2004), Statistical significance tests for machine translation evaluation, W04-3250. The interval holds the
    middle `confidence` of the differences. A fixed seed gives the same samples on every machine.

    Raises ValueError where the measures are of different metrics or numbers of examples, `samples` is less than 1, or
    `confidence` is not between 0 and 1.
    """
    ours, theirs = _resampled(current, reference, samples, confidence, seed)
    low, high = _interval(ours - theirs, confidence)
    value, other = current.value, reference.value
    gain = ours - theirs if current.higher_is_better else theirs - ours
    better, worse = float((gain > 0).mean()), float((gain < 0).mean())
    return Comparison(value, other, value - other, low, high, samples, better, worse, current.higher_is_better)


def ratio_interval(
    student: Measure, teacher: Measure, *, samples: int = 1000, confidence: float = 0.95, seed: int = 0
) -> tuple[float, float, float] | None:
    """How much of the teacher's quality the student keeps, with its interval: (ratio, low, high).

    The ratio is student ÷ teacher; where lower is better it is teacher ÷ student, so that 1 is all of it and less is a
    loss always. None where the divisor is 0: there is nothing to keep. Samples in which it is 0 are left out.

    Raises ValueError as `paired_bootstrap` does.
    """
    ours, theirs = _resampled(student, teacher, samples, confidence, seed)
    kept, whole = (student.value, teacher.value) if student.higher_is_better else (teacher.value, student.value)
    above, below = (ours, theirs) if student.higher_is_better else (theirs, ours)
    counts = below > 0
    if whole <= 0 or not counts.any():
        return None
    return (kept / whole, *_interval(above[counts] / below[counts], confidence))


def _resampled(current: Measure, reference: Measure, samples: int, confidence: float, seed: int) -> tuple[Array, Array]:
    """The scores of both, (samples,), on the same samples of the examples."""
    number = len(current.statistics)
    if number != len(reference.statistics):
        raise ValueError(f"{number} and {len(reference.statistics)} examples of {current.name}; they must be the same")
    if current.name != reference.name:
        raise ValueError(
            f"{current.name!r} is compared with {reference.name!r}; expected the same metric of two models"
        )
    if samples < 1:
        raise ValueError(f"samples={samples}; draw one or more (1000 is usual)")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence={confidence}; expected a share between 0 and 1 such as 0.95")
    ours, theirs = [], []
    for counts in _draws(number, samples, seed):
        ours.append(current.score(counts @ current.statistics))
        theirs.append(reference.score(counts @ reference.statistics))
    return np.concatenate(ours), np.concatenate(theirs)


def _draws(number: int, samples: int, seed: int) -> Iterator[Array]:
    """How often each example was drawn in each sample: float64 (up to `samples`, number), in parts that fit memory."""
    generator = np.random.default_rng(seed)
    at_once = max(1, _COUNTS_AT_ONCE // number)
    for start in range(0, samples, at_once):
        rows = min(at_once, samples - start)
        drawn = generator.integers(number, size=(rows, number)) + number * np.arange(rows)[:, None]
        yield np.bincount(drawn.ravel(), minlength=rows * number).reshape(rows, number).astype(np.float64)


def _interval(values: Array, confidence: float) -> tuple[float, float]:
    low, high = np.quantile(values, [(1 - confidence) / 2, (1 + confidence) / 2])
    return float(low), float(high)
