"""What a validation measures: the statistics of every example, out of which a score of any sample of them is made."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Measure:
    """One metric of n examples whose score is a function of sums over the examples.

    BLEU of a corpus, for one, is no mean of the sentences' BLEU, but follows from its sums of n-gram counts; the same
    holds for F1 out of a confusion matrix. Kept in this way, a metric can be computed for any sample of the examples.

    name:             as it stands in the records
    statistics:       (n, k) float64, those of each example
    score:            turns sums of statistics (..., k) into scores (...)
    higher_is_better: False for TER, the loss and the calibration error
    Raises ValueError where the statistics are not of two dimensions, of no example, or not finite.
    """

    name: str
    statistics: Array
    score: Callable[[Array], Array]
    higher_is_better: bool = True

    def __post_init__(self) -> None:
        shape = self.statistics.shape
        if len(shape) != 2 or not shape[0]:
            raise ValueError(
                f"{self.name}: statistics of shape {shape}; expected (examples, k) with one example or more"
            )
        if not np.isfinite(self.statistics).all():
            row = int(np.argmin(np.isfinite(self.statistics).all(axis=1)))
            raise ValueError(f"{self.name}: the statistics of example {row} are {self.statistics[row].tolist()}")

    @property
    def value(self) -> float:
        """The score of all examples."""
        return float(self.score(self.statistics.sum(axis=0)))

    def per_example(self) -> Array:
        """(n,): the score of each example alone."""
        return self.score(self.statistics)


def mean_measure(name: str, values: ArrayLike, higher_is_better: bool = True) -> Measure:
    """The mean of one number per example, (n,)."""
    column = np.asarray(values, dtype=np.float64)
    return Measure(name, np.stack([column, np.ones_like(column)], axis=-1), quotient, higher_is_better)


def quotient(sums: Array) -> Array:
    """(..., 2) → (...): the first sum over the second, 0 where the second is."""
    return divide(sums[..., 0], sums[..., 1])


def divide(above: ArrayLike, below: ArrayLike) -> Array:
    """above / below, 0 where `below` is 0."""
    above, below = np.broadcast_arrays(np.asarray(above, dtype=np.float64), np.asarray(below, dtype=np.float64))
    return np.divide(above, below, out=np.zeros(above.shape), where=below != 0)
