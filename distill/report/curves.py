"""Curves over the training steps: validation scores, and the losses with their parts."""

from typing import TYPE_CHECKING, Any

from neural_layers.distill.report.drawing import (
    MARKERS,
    TEACHER_DASHES,
    Point,
    draw_line,
    finish_steps,
    say_empty,
    score_limits,
    styled_figure,
)
from neural_layers.distill.report.line_labels import LineEnd, label_line_ends
from neural_layers.distill.report.numbers import digits
from neural_layers.distill.report.rollbacks import ROW_POINTS, draw_given_up, kept_and_given_up, mark_rollbacks
from neural_layers.distill.report.scores import gate_metric, score_named, scores_of
from neural_layers.distill.report.style import light

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_POINTS = 200
LOG_SCALE_FROM = 30  # the ratio of the largest to the smallest loss
PART_NAMES = {"loss": "loss", "kl": "KL", "hard": "hard", "cosine": "cosine", "mse": "MSE"}


def quality_plot(report: dict[str, Any]) -> "Figure":
    """The validation score that the student is judged by; see `score_plot`."""
    return score_plot(report, gate_metric(report), 3.5)


def validated_scores(report: dict[str, Any]) -> list[str]:
    """The scores that were logged at validations, the one that the student is judged by first."""
    logs = report["validation"]
    return scores_of([entry for name in ("student", "baseline") for entry in logs.get(name, [])], gate_metric(report))


def score_plot(report: dict[str, Any], metric: str, height_inches: float = 2.7) -> "Figure":
    """A validation score against the training step for student and baseline, the teacher's as a dashed line."""
    shown = score_named(metric)
    with styled_figure(height_inches, rows=1) as (figure, (axes,)):
        # The student last: where the two lines meet, its own must stay visible.
        series = {name: _scores(report["validation"].get(name, []), metric) for name in ("baseline", "student")}
        teacher = teacher_line(report, metric)
        values = [value * shown.scale for points in series.values() for _, value in points]
        finish_steps(axes, f"validation {shown.label}" + ", %" * (shown.scale == 100), _steps(series))
        level = None if teacher is None else teacher[0] * shown.scale
        axes.set_ylim(score_limits([*values, *([] if level is None else [level])] or [0.0]))
        ends = []
        for name, points in series.items():
            if points:
                scaled = [(step, value * shown.scale) for step, value in points]
                kept, given_up = kept_and_given_up(scaled)
                draw_given_up(axes, given_up, name)
                draw_line(axes, kept, name, marker=MARKERS[name])
                ends.append(LineEnd(*kept[-1], f"{name} {shown.show(points[-1][1])}", light(name)))
        if level is not None and teacher is not None:
            axes.axhline(level, color=light("teacher"), linestyle=TEACHER_DASHES, linewidth=1.6)
            text = f"teacher {shown.show(teacher[0])}"
            ends.append(LineEnd(axes.get_xlim()[1], level, text, light("teacher")))
        if not values:
            say_empty(axes, "no validation was logged")
        mark_rollbacks(axes, report.get("rollbacks", []))
        label_line_ends(axes, ends)
        return figure


def teacher_line(report: dict[str, Any], metric: str) -> tuple[float, str] | None:
    """The teacher's score for the dashed line and the set it comes from: `validation` if logged, otherwise `test`.

    None where the teacher has no such score.
    """
    logged = [value for _, value in _scores(report["validation"].get("teacher") or [], metric)]
    if logged:
        return (min if score_named(metric).better == "lower" else max)(logged), "validation"
    value = report["models"]["teacher"]["quality"].get(metric)
    return None if value is None else (value, "test")


def loss_plot(report: dict[str, Any]) -> "Figure":
    """Training losses against the step: above the student's and its parts, below the teacher's and the baseline's,
    where the run has trained them."""
    logs = report["training_log"]
    student = {part: _logged(logs.get("student", []), part) for part in PART_NAMES}
    others = {name: _logged(logs.get(name, []), "loss") for name in ("teacher", "baseline")}
    below = [name for name in others if others[name]]
    with styled_figure(6.4 if below else 3.5, rows=2 if below else 1) as (figure, (upper, *lower)):
        colors = {part: "student" if part == "loss" else part for part in PART_NAMES}
        rows = _loss_lines(upper, student, colors, PART_NAMES, report.get("rollbacks", []))
        title: dict[str, Any] = {"fontsize": 10.5, "loc": "left", "color": light("ink")}
        upper.set_title("student: loss and its parts", **title, pad=6 + ROW_POINTS * rows)
        for axes in lower:
            _loss_lines(axes, others, {name: name for name in others}, {name: name for name in others}, [])
            axes.set_title(f"{' and '.join(below)}: loss", **title)
        return figure


def _scores(entries: list[dict[str, Any]], metric: str) -> list[Point]:
    return [(entry["step"], entry[metric]) for entry in entries if entry.get(metric) is not None]


def _logged(log: list[dict[str, Any]], key: str) -> list[Point]:
    return [(entry["step"], entry[key]) for entry in log if entry.get(key) is not None]


def _steps(series: dict[str, list[Point]]) -> list[float]:
    return [step for points in series.values() for step, _ in points]


def _thinned(points: list[Point]) -> list[Point]:
    """Points as means of neighbours where there are too many to draw; the last keeps its step."""
    block = -(-len(points) // MAX_POINTS) or 1
    groups = [points[start : start + block] for start in range(0, len(points), block)]
    return [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]


def _loss_lines(
    axes: "Axes",
    series: dict[str, list[Point]],
    colors: dict[str, str],
    names: dict[str, str],
    rollbacks: list[dict[str, Any]],
) -> int:
    """Draw losses and the marks of rollbacks; returns the rows of the marks."""
    ends = []
    for key, logged in series.items():
        if logged:
            kept, given_up = kept_and_given_up(logged)
            points = _thinned(kept)
            draw_given_up(axes, [_thinned(line) for line in given_up], colors[key])
            draw_line(axes, points, colors[key])
            ends.append(LineEnd(*points[-1], f"{names[key]} {digits(points[-1][1])}", light(colors[key])))
    values = [value for points in series.values() for _, value in _thinned(points)]
    finish_steps(axes, "training loss", _steps(series))
    if not values:
        say_empty(axes, "no training was logged")
    elif min(values) > 0 and max(values) / min(values) >= LOG_SCALE_FROM:
        axes.set_yscale("log")
        axes.set_ylabel("training loss (log scale)")
    elif min(values) >= 0:
        axes.set_ylim(0, 1.05 * max(values) or 1.0)
    rows = mark_rollbacks(axes, rollbacks)
    label_line_ends(axes, ends)
    return rows
