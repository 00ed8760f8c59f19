"""What the options of all recipes can do: be recorded, be compared with those of an earlier call, be checked."""

from collections.abc import Callable
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, ClassVar

from neural_layers.distill.gate import QualityGate
from neural_layers.errors import InputError


class RecipeOptions:
    """A base of frozen dataclasses, whose fields are named as on the command line.

    free: the options that may change when a run is continued, because none of them changes the numbers of the result
    """

    free: ClassVar[tuple[str, ...]] = ("out", "resume")

    def record(self) -> dict[str, Any]:
        """The options as JSON has them."""
        own: Any = self
        plain = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(own).items()}
        return {k: list(v) if isinstance(v, tuple) else v for k, v in plain.items()}

    def differing(self, other: dict[str, Any]) -> tuple[str, Any, Any] | None:
        """The first option that is not as in `other`, a record: its name on the command line, there and here."""
        record, own = self.record(), self
        names = [field.name for field in fields(own)]  # type: ignore[arg-type]
        for name in names:
            if name not in self.free and other.get(name) != record[name]:
                return flag(name), other.get(name), record[name]
        return None

    def require(self, names: tuple[str, ...], holds: Callable[[Any], bool], rule: str) -> None:
        """Raise InputError for the first of these options that is given and for which the rule does not hold."""
        for name in names:
            value = getattr(self, name)
            if value is not None and not holds(value):
                raise InputError(f"{flag(name)} {value} {rule}")

    def one_of(self, name: str, allowed: tuple[str, ...]) -> None:
        """Raise InputError where the option has none of the values that there are."""
        self.require((name,), lambda value: value in allowed, f"must be one of {', '.join(allowed)}")

    def gate(self, metric: str) -> QualityGate:
        """The gate of the recipe's student; raises InputError for a threshold out of its range."""
        own: Any = self
        return QualityGate(
            metric,
            own.max_drop,
            own.gate_patience,
            own.lr_factor,
            own.min_retention,
            own.confidence,
            own.samples,
        )

    def check_seed(self) -> None:
        """Raise InputError for a seed that a generator cannot take."""
        self.require(("seed",), lambda seed: 0 <= seed < 2**32, f"is out of range; give one from 0 to {2**32 - 1}")


def flag(name: str) -> str:
    """An option's name on the command line."""
    return "--" + name.replace("_", "-")
