"""What a search makes best."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from neural_layers.distill.search.recipe import MAXIMIZE, MINIMIZE, SearchedRecipe, nearest
from neural_layers.errors import InputError


@dataclass(frozen=True)
class Objective:
    """A metric and the direction in which it gets better, "min" or "max"."""

    name: str
    direction: str

    def __str__(self) -> str:
        return f"{self.name}:{self.direction}"

    @property
    def study_direction(self) -> Literal["minimize", "maximize"]:
        """As Optuna calls it."""
        return "minimize" if self.direction == MINIMIZE else "maximize"

    def better(self, value: float, other: float) -> bool:
        """Whether `value` is better than `other`."""
        return value < other if self.direction == MINIMIZE else value > other


def parse_objectives(texts: Sequence[str], recipe: SearchedRecipe) -> tuple[Objective, ...]:
    """The objectives that `METRIC` or `METRIC:min`, `METRIC:max` name, or the recipe's default.

    Raises InputError for a metric that the recipe has not, another direction, and one that is named twice.
    """
    known, found = {**recipe.scores, **recipe.costs}, dict[str, Objective]()
    for text in texts or (recipe.default,):
        name, colon, direction = text.partition(":")
        if name not in known:
            raise InputError(f"--objective {text}: {recipe.name} measures no {name!r}; {nearest(name, [*known])}")
        if colon and direction not in (MINIMIZE, MAXIMIZE):
            raise InputError(f"--objective {text}: the direction is min or max, not {direction!r}")
        if name in found:
            raise InputError(f"--objective {name} is given twice; leave one of them out")
        found[name] = Objective(name, direction or known[name])
    return tuple(found.values())
