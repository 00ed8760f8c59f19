"""The gate that watches a student: has it got worse, and by more than chance?"""

from dataclasses import asdict, dataclass
from typing import Any

from neural_layers.distill.validation.bootstrap import Comparison, paired_bootstrap
from neural_layers.distill.validation.measures import Measure
from neural_layers.errors import InputError


@dataclass(frozen=True)
class QualityGate:
    """When a student counts as degraded, what is done about it, and what it must keep in the end.

    metric:        the validation's metric that is watched, such as "bleu", "macro_f1" or "loss"
    max_drop:      a fall of more than this share of the best validation is a degradation, where the paired bootstrap
                   confirms that the student is worse: the whole `confidence` interval of the difference says so
    patience:      how many times the training goes back to its best checkpoint; the next degradation ends it there
    lr_factor:     what the learning rate is multiplied by each time
    min_retention: the share of the teacher's quality that the student must keep at the end
    confidence, samples: of the bootstrap

    Raises InputError for a threshold out of its range.
    """

    metric: str
    max_drop: float = 0.05
    patience: int = 3
    lr_factor: float = 0.5
    min_retention: float = 0.9
    confidence: float = 0.95
    samples: int = 1000

    def __post_init__(self) -> None:
        for name, low, high in (("max_drop", 0, 1), ("lr_factor", 0, 1), ("confidence", 0, 1)):
            value = getattr(self, name)
            if not low < value < high:
                raise InputError(f"{name}={value} must lie between {low} and {high}")
        if not 0 <= self.min_retention <= 1:
            raise InputError(f"min_retention={self.min_retention} must lie in [0, 1], as a share of the teacher's")
        if self.patience < 0 or self.samples < 1:
            raise InputError(f"patience={self.patience} must be at least 0, and samples={self.samples} at least 1")

    def compare(self, current: Measure, best: Measure) -> Comparison:
        """The current validation with the best one, on the same examples."""
        return paired_bootstrap(current, best, samples=self.samples, confidence=self.confidence)

    def is_degraded(self, comparison: Comparison) -> bool:
        """Whether the fall is larger than `max_drop` of the best, and no accident of the sample."""
        fall = comparison.difference if not comparison.higher_is_better else -comparison.difference
        return fall > self.max_drop * abs(comparison.reference) and comparison.is_worse

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Rollback:
    """A degradation that was found: at which step, the best step that the training went back to, the metric at both,
    the interval of their difference, and what the learning rate was multiplied by (all rollbacks so far together)."""

    step: int
    to: int
    metric: str
    best: float
    value: float
    low: float
    high: float
    learning_rate_factor: float

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)

    def __str__(self) -> str:
        return (
            f"step {self.step}: {self.metric} {self.value:.4g} is worse than the best, {self.best:.4g} at step "
            f"{self.to} (difference {self.low:.4g} to {self.high:.4g})"
        )
