"""How much is pruned at which step of a training."""

from dataclasses import dataclass

from neural_layers.wrappers.pruning.prune import check_amount

_POWERS = {"cubic": 3, "linear": 1}


@dataclass(frozen=True)
class PruningSchedule:
    """The pruned share rises from `initial` to `final` in `times` prunings, `every` steps apart, from step `start` on.

    The i-th of them, i = 0 … times − 1, is done before step start + i · every and prunes to

        s_i = final + (initial − final) · (1 − i / (times − 1))^p,   p = 3: "cubic" (arXiv 1710.01878), 1: "linear"

    of the whole; a single one prunes to `final` at once. Between two of them, and for `recovery` steps at the least
    after the last, the training makes up for what was lost.

    Raises ValueError for shares outside [0, 1), a share that falls, and counts that are not positive.
    """

    final: float
    times: int
    every: int
    start: int = 0
    initial: float = 0.0
    shape: str = "cubic"
    recovery: int = 1

    def __post_init__(self) -> None:
        check_amount("final", self.final)
        check_amount("initial", self.initial)
        if self.initial > self.final:
            raise ValueError(f"initial={self.initial} must not be more than final={self.final}")
        for name, least in (("times", 1), ("every", 1), ("start", 0), ("recovery", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name}={value!r} must be an integer of at least {least}")
        if self.shape not in _POWERS:
            raise ValueError(f"shape={self.shape!r} must be one of {', '.join(_POWERS)}")

    @property
    def last(self) -> int:
        """The step before which the last pruning is done."""
        return self.start + (self.times - 1) * self.every

    @property
    def steps(self) -> int:
        """How many steps the training needs at the least."""
        return self.last + self.recovery

    def amount(self, step: int) -> float | None:
        """The share to prune to before step `step` (counted from 0); None where nothing is pruned then."""
        done, rest = divmod(step - self.start, self.every)
        if rest or not 0 <= done < self.times:
            return None
        left = 0.0 if self.times == 1 else 1 - done / (self.times - 1)
        return self.final + (self.initial - self.final) * left ** _POWERS[self.shape]
