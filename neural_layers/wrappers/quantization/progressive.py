"""Bits are taken from a model layer by layer, from those that need them least, until a size or a floor is reached."""

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from neural_layers.errors import InputError
from neural_layers.wrappers.modules import tensor_bytes
from neural_layers.wrappers.quantization.descent import AS_IT_IS, Descent, Step
from neural_layers.wrappers.quantization.ladder import Ladder
from neural_layers.wrappers.quantization.plan import Plan
from neural_layers.wrappers.quantization.quantize import quantize
from neural_layers.wrappers.quantization.report import QuantizationReport
from neural_layers.wrappers.quantization.sensitivity import Sensitivity, measure
from neural_layers.wrappers.quantization.table import lines
from neural_layers.wrappers.quantization.trials import as_batches, evaluating, shell

FLOOR = 0.9


@dataclass(frozen=True)
class Point:
    """A model's bytes and its score."""

    name: str
    bytes: int
    score: float


@dataclass(frozen=True)
class Progressive:
    """What `progressive_quantize` did.

    plan:        replays with `quantize(model, plan)` to the same bits
    report:      of `quantize`; None where no layer was lowered
    original, result: the model before and after. uniform: all layers on one rung of the ladder, each
    steps:       every evaluation on the way, also of what was taken back
    sensitivity: {layer: {rung: divergence}}, see `sensitivity.measure`
    ended:       why it went no further
    """

    plan: Plan
    report: QuantizationReport | None = field(repr=False)
    original: Point
    result: Point
    uniform: tuple[Point, ...]
    steps: tuple[Step, ...]
    sensitivity: Sensitivity
    floor: float | None
    target_bytes: int | None
    ended: str

    @property
    def ratio(self) -> float:
        """How many times smaller the model is."""
        return self.original.bytes / max(self.result.bytes, 1)

    def to_dict(self) -> dict[str, Any]:
        """Everything but the report, as JSON takes it."""
        return {
            "plan": {"layers": self.plan.layers},
            "original": vars(self.original),
            "result": vars(self.result),
            "uniform": [vars(point) for point in self.uniform],
            "steps": [step.to_dict() for step in self.steps],
            "sensitivity": self.sensitivity,
            "floor": self.floor,
            "target_bytes": self.target_bytes,
            "ended": self.ended,
        }

    def plot(self, path: Path | str, *, title: str = "", score: str = "score") -> None:
        """Write the trade-off as a PNG: the score against the bytes on the way, and of the uniform schemes beside it.

        title, score: what stands above, and at the axis. Raises ImportError without matplotlib (extra `train`).
        """
        from neural_layers.wrappers.quantization.plot import draw

        draw(self, Path(path), title, score)

    def __str__(self) -> str:
        table = [("", "MB", "ratio", "score", "kept")]
        for point in (self.original, *self.uniform, self.result):
            ratio, kept = self.original.bytes / max(point.bytes, 1), point.score / self.original.score
            table.append((point.name, f"{point.bytes / 1e6:.3f}", f"{ratio:.2f}", f"{point.score:.5g}", f"{kept:.1%}"))
        counts: dict[str, int] = {}
        for entry in self.plan.layers.values():
            counts[entry["scheme"]] = counts.get(entry["scheme"], 0) + 1
        layers = ", ".join(f"{count} in {scheme}" for scheme, count in counts.items()) or "none lowered"
        return f"{lines(table)}\nlayers: {layers}; {self.ended}"


def progressive_quantize(
    model: nn.Module,
    evaluate: Callable[[Any], float],
    *,
    calibration: Iterable[Any],
    floor: float | None = None,
    target_bytes: int | None = None,
    ladder: Sequence[str | Mapping[str, Any]] = ("bf16", "int8", "nf4"),
    exclude: str | Iterable[str] = (),
    embeddings: bool = True,
    chunks: int = 10,
    tell: Callable[[str], None] = lambda line: None,
) -> Progressive:
    """Lower the bits of `model` in place, layer by layer, the least sensitive first.

    1. Each layer alone is put on each rung, and the divergence of the logits from the model's own is measured on
       `calibration` (`sensitivity.measure`): one pass for each layer and rung, and no evaluation.
    2. Of all moves to lower rungs, that of the least divergence per byte saved comes first; a layer that gains more by
       leaving a rung out leaves it out.
    3. After every `chunks`-th part of them the model is evaluated. Where the score falls below `floor` times the
       model's own, they are taken back and tried by halves; a single move that breaks the floor is refused for good.
    4. It ends at `target_bytes`, where of all mixtures of that size the one with the least sum of divergences is taken;
       or when no move is left, or three in a row were refused.

    evaluate:     a model's score, positive, more is better (of a loss give exp(−loss)); called on copies in evaluation
                  mode without gradients, `chunks` times and a few, and once for each rung with all layers on it
    calibration:  batches: a dict is `model(**batch)`, a tuple or list `model(*batch)`, a tensor `model(batch)`
    floor:        the share of the model's own score to keep, above 0 and at most 1; 0.9 where neither it nor
                  target_bytes is given
    target_bytes: bytes of all parameters and buffers to come down to
    ladder:       rungs from above: schemes of `quantize`, "bf16", "fp16", "int8" for short, "nf4-double" and
                  "fp4-double" with scales quantized too; or `quantize`'s arguments as a dict. A layer passes over a
                  rung that it cannot take, or on which it would grow.
    exclude, embeddings: as `quantize` takes them. tell: is called with a line on each evaluation.

    Memory: beside the model, one quantized copy for each rung, and the logits of all batches.
    Raises InputError for calibration data that is empty or does not fit and for a target that cannot be reached (the
    smallest reachable size is named), ValueError for other wrong arguments and for a score that is not finite and
    positive; `model` is then as it was.
    """
    if floor is None and target_bytes is None:
        floor = FLOOR
    _check(floor, target_bytes, chunks)
    batches = as_batches("calibration", calibration)
    steps = Ladder(model, ladder, batches, exclude=exclude, embeddings=embeddings)
    if target_bytes is not None and target_bytes < steps.least:
        raise InputError(
            f"target_bytes={target_bytes:,} cannot be reached: with all layers on the lowest rung of "
            f"{', '.join(steps.rungs)} the model has {steps.least:,} bytes; give at least that, or a lower rung"
        )
    with evaluating(model):
        score = _scorer(evaluate)
        original = Point(AS_IT_IS, steps.bytes, score(shell(model), "as it is"))
        uniform = [
            Point(rung, tensor_bytes(made), score(made, f"all {rung}")) for rung, made in steps.uniform().items()
        ]
        for point in (original, *uniform):
            tell(f"{point.name}: {point.bytes:,} bytes, score {point.score:.5g}")
        sensitivity = measure(steps, batches)
        least = None if floor is None else floor * original.score
        descent = Descent(steps, sensitivity, score, least=least, target=target_bytes, chunks=chunks, tell=tell)
        state, found, ended = descent.run(original.score)
    if target_bytes is not None and steps.bytes_of(state) > target_bytes:
        raise InputError(
            f"target_bytes={target_bytes:,} cannot be reached above the floor of {floor:.1%}: the smallest size found "
            f"is {steps.bytes_of(state):,} bytes; give at least that, or a lower floor"
        )
    plan = steps.plan(state)
    report = quantize(model, plan, **steps.options(plan)) if state else None
    result = Point("progressive", tensor_bytes(model), found)
    return Progressive(
        plan, report, original, result, tuple(uniform), tuple(descent.steps), sensitivity, floor, target_bytes, ended
    )


def _check(floor: float | None, target_bytes: int | None, chunks: int) -> None:
    if floor is not None and not 0 < floor <= 1:
        raise ValueError(f"floor={floor} must be above 0 and at most 1: a share of the model's own score")
    if target_bytes is not None and (not isinstance(target_bytes, int) or target_bytes < 1):
        raise ValueError(f"target_bytes={target_bytes!r} must be a whole number of bytes, at least 1")
    if chunks < 1:
        raise ValueError(f"chunks={chunks} must be at least 1")


def _scorer(evaluate: Callable[[Any], float]) -> Callable[[nn.Module, str], float]:
    def score(model: nn.Module, what: str) -> float:
        with evaluating(model):
            given = evaluate(model)
        try:
            found = float(given)
        except (TypeError, ValueError, RuntimeError) as problem:
            raise ValueError(f"evaluate gives a {type(given).__name__} ({what}); it must give one number") from problem
        if not math.isfinite(found) or found <= 0:
            raise ValueError(
                f"evaluate gives {found} ({what}); it must be finite and positive, and more must be better: of a loss "
                "give exp(-loss)"
            )
        return found

    return score
