"""Classes of unequal size: found, told, and met with weights or with sampling."""

from collections.abc import Sequence
from dataclasses import dataclass

METHODS = ("none", "weights", "sampling")
NOTABLE_RATIO = 1.5  # below it the line says that the classes are about equally large


@dataclass(frozen=True)
class ClassBalance:
    """How many examples each class has: `counts` (C,), by the number of the class."""

    classes: tuple[str, ...]
    counts: tuple[int, ...]

    @classmethod
    def of(cls, labels: Sequence[int], classes: Sequence[str]) -> "ClassBalance":
        """Count `labels`. Raises ValueError where a class has no example: it could have no weight."""
        counts = tuple(sum(label == number for label in labels) for number in range(len(classes)))
        if 0 in counts:
            raise ValueError(f"class {classes[counts.index(0)]!r} has no example; leave it out or add some")
        return cls(tuple(classes), counts)

    @property
    def ratio(self) -> float:
        """The size of the largest class to that of the smallest: 1 where all are equal."""
        return max(self.counts) / min(self.counts)

    @property
    def weights(self) -> tuple[float, ...]:
        """n / (C · n_c) for each class: their mean over the examples is 1, and every class weighs the same in sum."""
        total = sum(self.counts)
        return tuple(total / (len(self.counts) * count) for count in self.counts)

    def example_weights(self, labels: Sequence[int]) -> list[float]:
        """The weight of each example's class: drawn by them with replacement, the classes come equally often."""
        weights = self.weights
        return [weights[label] for label in labels]

    def sentence(self, method: str) -> str:
        """One line: the largest and the smallest class, their ratio, and what is done about it."""
        large, small = (self.counts.index(pick(self.counts)) for pick in (max, min))
        sizes = f"{self.classes[large]} {self.counts[large]:,} to {self.classes[small]} {self.counts[small]:,}"
        if self.ratio < NOTABLE_RATIO:
            return f"classes: about equally large ({sizes}, ratio {self.ratio:.1f})"
        met = {
            "none": "not met; --imbalance weights or sampling would",
            "weights": "met with weights in the loss of the hard labels",
            "sampling": "met by drawing the small classes more often",
        }
        return f"classes: the largest to the smallest is {sizes}, ratio {self.ratio:.1f}; {met[method]}"
