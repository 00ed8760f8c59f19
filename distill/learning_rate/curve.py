"""The curve of a range test: the loss against a growing learning rate."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

BETA = 0.9  # of the moving average: about the last ten losses count
DIVERGED = 4.0  # times the best loss: from there on nothing is learned


@dataclass(frozen=True)
class LearningRateCurve:
    """What a range test saw.

    rates, losses: of each step; smoothed: the losses' moving average. suggestion: the rate at which the smoothed loss
    falls steepest per octave, None where it never falls. diverged: whether the test ended because the loss did
    """

    rates: tuple[float, ...]
    losses: tuple[float, ...]
    smoothed: tuple[float, ...]
    suggestion: float | None
    diverged: bool

    @classmethod
    def of(cls, rates: Sequence[float], losses: Sequence[float], diverged: bool = False) -> "LearningRateCurve":
        """The curve of these losses. Raises ValueError where there are fewer than three, or not a rate for each."""
        if len(rates) != len(losses) or len(losses) < 3:
            raise ValueError(f"{len(rates)} rates and {len(losses)} losses: a curve has three of each or more")
        smoothed = smooth(losses)
        return cls(tuple(rates), tuple(losses), tuple(smoothed), steepest(rates, smoothed), diverged)


def exponential_rates(low: float, high: float, steps: int) -> list[float]:
    """`steps` rates from `low` to `high`, each the same factor above the one before."""
    return [low * (high / low) ** (i / (steps - 1)) for i in range(steps)]


def smooth(losses: Sequence[float], beta: float = BETA) -> list[float]:
    """The exponential moving average s_t = β s_{t−1} + (1 − β) loss_t, divided by 1 − β^t as Adam corrects its bias."""
    average, smoothed = 0.0, []
    for t, loss in enumerate(losses, start=1):
        average = beta * average + (1 - beta) * loss
        smoothed.append(average / (1 - beta**t))
    return smoothed


def steepest(rates: Sequence[float], smoothed: Sequence[float]) -> float | None:
    """The rate at the steepest fall of the smoothed loss over the logarithm of the rate, up to where it is lowest.

    Central differences, so the first and the last rate cannot be suggested. None where the loss falls nowhere.
    """
    end = min(range(len(smoothed)), key=smoothed.__getitem__)
    slopes = {
        i: (smoothed[i + 1] - smoothed[i - 1]) / math.log(rates[i + 1] / rates[i - 1])
        for i in range(1, min(end + 1, len(smoothed) - 1))
    }
    lowest = min(slopes, key=slopes.__getitem__, default=None)
    return rates[lowest] if lowest is not None and slopes[lowest] < 0 else None
