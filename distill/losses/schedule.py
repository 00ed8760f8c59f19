"""Weights and temperatures that change while a model is trained."""

import math
from dataclasses import dataclass

from neural_layers.errors import InputError

_SHAPES = ("linear", "cosine")


@dataclass(frozen=True)
class Schedule:
    """A number that goes from `start` to `end` while the progress p goes from 0 to 1.

    linear: start + p (end − start);  cosine: end + (start − end) (1 + cos π p) / 2
    Raises InputError for numbers that are not finite and for another shape.
    """

    start: float
    end: float
    shape: str = "linear"

    def __post_init__(self) -> None:
        for number in (self.start, self.end):
            if not math.isfinite(number):
                raise InputError(f"a schedule goes from {self.start} to {self.end}; both must be finite")
        if self.shape not in _SHAPES:
            raise InputError(f"there is no schedule {self.shape!r}; there are {' and '.join(_SHAPES)}")

    @classmethod
    def parse(cls, text: "str | float | Schedule") -> "Schedule":
        """ "0.9" stays, "0.9:0.5" falls linearly, "0.9:0.5:cosine" along a cosine; a number stays too."""
        if isinstance(text, Schedule):
            return text
        if isinstance(text, str):
            numbers, shape = text.split(":")[:2], text.split(":")[2:]
            try:
                start, end = float(numbers[0]), float(numbers[-1])
            except ValueError:
                numbers, start, end = [], 0.0, 0.0
            if not numbers or len(shape) > 1:
                raise InputError(f"{text!r} is no schedule; give a number, START:END or START:END:cosine")
            return cls(start, end, *shape)
        return cls(float(text), float(text))

    def at(self, progress: float) -> float:
        """The number at that progress, exactly `start` at 0 and `end` at 1."""
        if self.start == self.end:
            return self.start  # to the last bit: a teacher cache is of one temperature
        share = progress if self.shape == "linear" else (1 - math.cos(math.pi * progress)) / 2
        return self.start * (1 - share) + self.end * share

    @property
    def ends(self) -> tuple[float, float]:
        """Every value lies between these two."""
        return self.start, self.end

    def __str__(self) -> str:
        if self.start == self.end:
            return f"{self.start}"
        return f"{self.start}:{self.end}" + (":cosine" if self.shape == "cosine" else "")
