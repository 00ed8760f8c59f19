"""Putting compressed forms through the student's evaluation and the gate's threshold."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from neural_layers.distill.compression.compress import BATCH, STUDENT, Compressed
from neural_layers.distill.report.numbers import percent
from neural_layers.distill.report.scores import score_named
from neural_layers.timing import measure_latency, measure_throughput

Predict = Callable[[Sequence[str]], Any]
LOWER_IS_BETTER = ("ter", "loss", "perplexity", "bits_per_byte", "calibration_error")


@dataclass(frozen=True)
class Threshold:
    """What a form must keep of the teacher: `min_retention` (0 … 1) of its score in each of `metrics`."""

    metrics: tuple[str, ...]
    min_retention: float = 0.9


def measure_compressed(
    forms: Mapping[str, Compressed],
    evaluate: Callable[[Predict], Mapping[str, Any]],
    threshold: Threshold,
    *,
    teacher: Mapping[str, float],
    student: Mapping[str, float] | None = None,
    examples: Sequence[str],
    batch_size: int = BATCH,
    tell: Callable[[str], None] = lambda line: None,
) -> list[dict[str, Any]]:
    """The entry `compression` of a report, one for each form, in their order.

    forms:     what `compress` returned
    evaluate:  the scores of a `Compressed.predict` on the test set: {metric: number, or a `Measure`}
    teacher:   the teacher's scores on the same set. student: the student's; where they are left out, it is evaluated
    examples:  texts to time; the forms take turns at them
    batch_size: of the throughput

    Each: {"variant", "file_bytes", "memory_bytes", "latency_ms", "throughput", "quality", "retention" (of the
    teacher's score), "kept" (of the student's), "passed", "note"}. A form that could not be made has None for what was
    not measured, and has not passed; nor has one of which a score cannot be told. Raises KeyError where `evaluate` or
    the teacher leaves out a metric of the threshold.
    """
    made = {name: form for name, form in forms.items() if form.predict is not None}
    scores = {}
    for name, form in made.items():
        assert form.predict is not None
        known = student if name == STUDENT else None
        found = evaluate(form.predict) if known is None else known
        scores[name] = {metric: float(getattr(value, "value", value)) for metric, value in found.items()}
    predicts: dict[str, Any] = {name: form.predict for name, form in made.items()}
    latency = measure_latency({name: _one(predict) for name, predict in predicts.items()}, examples)
    throughput = measure_throughput(predicts, examples, batch_size=batch_size)
    own = scores.get(STUDENT, student or {})
    entries = []
    for name, form in forms.items():
        quality = scores.get(name)
        retention = _ratios(quality or {}, teacher)
        lost = [m for m in threshold.metrics if quality is None or not _keeps(retention[m], threshold.min_retention)]
        entries.append(
            {
                "variant": name,
                "file_bytes": form.file_bytes,
                "memory_bytes": form.memory_bytes,
                "latency_ms": latency.get(name),
                "throughput": throughput.get(name),
                "quality": quality,
                "retention": retention,
                "kept": _ratios(quality or {}, own),
                "passed": not lost,
                "note": form.note,
            }
        )
        tell(verdict(entries[-1], threshold))
    return entries


def verdict(entry: Mapping[str, Any], threshold: Threshold) -> str:
    """One line on an entry of `measure_compressed`: what it keeps of the teacher, and whether that is enough."""
    if entry["quality"] is None:
        return f"{entry['variant']} failed: {entry['note']}"
    kept = " and ".join(_share(metric, entry["retention"][metric]) for metric in threshold.metrics)
    word, least = "passed" if entry["passed"] else "failed", percent(threshold.min_retention)
    return f"{entry['variant']} {word}: it keeps {kept} (at least {least} % is asked for)"


def _share(metric: str, kept: float | None) -> str:
    label = score_named(metric).label
    return f"nothing of {label}, of which the teacher has none" if kept is None else f"{percent(kept)} % of {label}"


def _one(predict: Predict) -> Callable[[str], Any]:
    return lambda example: predict([example])


def _ratios(quality: Mapping[str, float], reference: Mapping[str, float]) -> dict[str, float | None]:
    """How much of the reference's scores is kept: value ÷ reference, or reference ÷ value where lower is better, so
    that less than 1 is a loss always. None where the divisor is 0. Scores of which 1 is best have no share."""
    ratios: dict[str, float | None] = {}
    for metric in quality:
        if metric in reference and metric != "length_ratio":
            above, below = quality[metric], reference[metric]
            if metric in LOWER_IS_BETTER:
                above, below = below, above
            ratios[metric] = above / below if below > 0 else None
    return ratios


def _keeps(ratio: float | None, at_least: float) -> bool:
    return ratio is not None and ratio >= at_least
