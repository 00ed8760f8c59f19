"""What a search knows of the recipe that it tunes."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import TrainerCallback

MINIMIZE, MAXIMIZE = "min", "max"
# What every distillation measures of its student, and the better direction.
COSTS = {
    "parameters": MINIMIZE,
    "file_bytes": MINIMIZE,
    "memory_bytes": MINIMIZE,
    "latency_p50": MINIMIZE,
    "latency_p95": MINIMIZE,
    "latency_p99": MINIMIZE,
    "throughput": MAXIMIZE,
    "seconds": MINIMIZE,
}


@dataclass(frozen=True)
class Option:
    """An option of a recipe's command line.

    kind: "int", "float", "text", or "switch", which takes no value. aliases: its other flags
    """

    flag: str
    kind: str
    aliases: tuple[str, ...] = ()


@dataclass(frozen=True)
class SearchedRecipe:
    """A recipe as a search runs it.

    words:   of its command, such as ("distill", "ntmm")
    options: what can be searched, by the name of the field
    scores:  the metrics of its validations, with "min" or "max"; a trial can be pruned by them
    costs:   what else is measured at its end, likewise
    default: the objective where none is named
    parse:   the options out of a command line's arguments; raises InputError
    run:     runs it with options, the command that it is told by, and callbacks for the trainer of the model that is
             searched; returns its report
    measure: the scores and costs out of that report
    """

    words: tuple[str, ...]
    options: Mapping[str, Option]
    scores: Mapping[str, str]
    costs: Mapping[str, str]
    default: str
    parse: Callable[[Sequence[str]], Any]
    run: Callable[[Any, str, "Sequence[TrainerCallback]"], dict[str, Any]]
    measure: Callable[[dict[str, Any]], dict[str, float]]

    @property
    def name(self) -> str:
        """As on the command line."""
        return " ".join(self.words)


def measured_student(report: dict[str, Any]) -> dict[str, float]:
    """The student's scores at its best validation, whose weights are the result, and its costs. The test data takes no
    part: a search that looked at it would fit it."""
    best = report["gate"]["best_step"]
    history = report["validation"]["student"]
    chosen = [entry for entry in history if entry["step"] == best] or history
    student = report["models"]["student"]
    latency = student.get("latency_ms") or {}
    found = {**chosen[-1], **student, **{f"latency_{name}": value for name, value in latency.items()}}
    found["seconds"] = (student.get("training") or {}).get("seconds")
    return _numbers({name: value for name, value in found.items() if name != "step"})


def measured_language_model(report: dict[str, Any]) -> dict[str, float]:
    """The validation of the model that a training ends with, and its costs."""
    return _numbers({**report["validation"], "parameters": report["parameters"], "seconds": report["seconds"]})


def _numbers(found: Mapping[str, Any]) -> dict[str, float]:
    return {k: v for k, v in found.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}


def nearest(name: str, names: Sequence[str]) -> str:
    """Words on the names that are like `name`, else on all."""
    close = get_close_matches(name, names, 3, 0.6)
    if close:
        return "did you mean " + " or ".join(close) + "?"
    return "there are " + ", ".join(names)
