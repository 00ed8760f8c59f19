"""The parameters of a search as a person writes them: `lr=1e-4..1e-2:log`, `layers=1..4`, `student_width=32|48|64`."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from neural_layers.distill.search.recipe import Option, nearest
from neural_layers.errors import InputError

if TYPE_CHECKING:
    import optuna

Value = int | float | str
_HOW = "write NAME=LOW..HIGH, with :log or :step=X behind it, or NAME=ONE|ANOTHER"
_WHOLE = re.compile(r"[+-]?\d+")


@dataclass(frozen=True)
class Parameter:
    """One option of a recipe and the values that a search may give it: a range with both ends, or choices.

    spec: as it was written, without the name
    """

    name: str
    spec: str
    option: Option
    low: float = 0.0
    high: float = 0.0
    is_whole: bool = False
    log: bool = False
    step: float | None = None
    choices: tuple[Value, ...] = ()

    def suggest(self, trial: "optuna.Trial") -> Value:
        """The sampler's value for this trial; the same one however often it is asked."""
        if self.choices:
            chosen: Any = trial.suggest_categorical(self.name, self.choices)
            return chosen
        if self.is_whole:
            step = 1 if self.step is None else int(self.step)
            return trial.suggest_int(self.name, int(self.low), int(self.high), step=step, log=self.log)
        return trial.suggest_float(self.name, self.low, self.high, step=self.step, log=self.log)

    def arguments(self, value: Value) -> list[str]:
        """The value on the recipe's command line; read there it is the same number."""
        if self.option.kind == "switch":
            return [self.option.flag] if value == "true" else []
        return [f"{self.option.flag}={value}"]


def parse_parameters(texts: Sequence[str], options: Mapping[str, Option]) -> tuple[Parameter, ...]:
    """The parameters of a search. Raises InputError, naming what is wrong, for anything that is not one."""
    if not texts:
        raise InputError("a search needs something to search: give --parameter NAME=SPEC; " + _HOW)
    found: dict[str, Parameter] = {}
    for text in texts:
        parameter = parse_parameter(text, options)
        if parameter.name in found:
            raise InputError(f"--parameter {parameter.name} is given twice; leave one of them out")
        found[parameter.name] = parameter
    return tuple(found.values())


def parse_parameter(text: str, options: Mapping[str, Option]) -> Parameter:
    """One parameter; the option is named as its field or its flag. Raises InputError."""
    written, equals, spec = text.partition("=")
    name = _field(written, options)
    if not equals or not spec:
        raise InputError(f"--parameter {text} names no values; {_HOW}")
    if name not in options:
        raise InputError(
            f"--parameter {text}: the recipe has no option {name!r} to search; {nearest(name, [*options])}"
        )
    option = options[name]
    if ".." in spec and "|" not in spec:
        return _range(text, name, spec, option)
    return _choices(text, name, spec, option)


def _field(written: str, options: Mapping[str, Option]) -> str:
    """The field that a name or a flag means."""
    name = written.strip().lstrip("-").replace("_", "-")
    for field, option in options.items():
        if f"--{name}" in (option.flag, *option.aliases):
            return field
    return name.replace("-", "_")


def _choices(text: str, name: str, spec: str, option: Option) -> Parameter:
    words = [word.strip() for word in spec.split("|")]
    if "" in words:
        raise InputError(f"--parameter {text} has an empty choice; {_HOW}")
    if option.kind == "switch" and not set(words) <= {"true", "false"}:
        raise InputError(f"--parameter {text}: {option.flag} takes no value; write {name}=true|false")
    values = tuple(_number(text, word, option) if option.kind in ("int", "float") else word for word in words)
    if len(set(values)) < len(values):
        raise InputError(f"--parameter {text} names a choice twice; leave one of them out")
    if len(values) == 1:
        raise InputError(f"--parameter {text} has one choice, which is no search; give {option.flag} behind -- instead")
    return Parameter(name, spec, option, choices=values)


def _range(text: str, name: str, spec: str, option: Option) -> Parameter:
    if option.kind == "switch":
        raise InputError(f"--parameter {text}: {option.flag} takes no value; write {name}=true|false")
    span, *rest = spec.split(":")
    low, high = (_number(text, end.strip(), option) for end in [*span.split(".."), ""][:2])
    log, step = False, None
    for word in rest:
        if word == "log":
            log = True
        elif word.startswith("step="):
            step = _number(text, word.removeprefix("step="), option)
        else:
            raise InputError(f"--parameter {text}: {word!r} is not understood; {_HOW}")
    if not low < high:
        raise InputError(f"--parameter {text} is an empty range: {low:g} is not below {high:g}")
    if log and low <= 0:
        raise InputError(f"--parameter {text}: a logarithmic range begins above 0, and this one at {low:g}")
    if log and step is not None:
        raise InputError(f"--parameter {text}: a range has :log or :step, not both")
    if step is not None and not 0 < step <= high - low:
        raise InputError(f"--parameter {text}: the step must be above 0 and at most {high - low:g}")
    return Parameter(name, spec, option, low, high, option.kind == "int", log, step)


def _number(text: str, word: str, option: Option) -> Any:
    if option.kind == "int" and not _WHOLE.fullmatch(word):
        raise InputError(f"--parameter {text}: {option.flag} takes whole numbers, and {word!r} is none")
    try:
        value = int(word) if option.kind == "int" else float(word)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise InputError(f"--parameter {text}: {word!r} is no finite number; {_HOW}")
    return value
