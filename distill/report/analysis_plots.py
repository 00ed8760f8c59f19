"""Plots of where models err: quality by the length of the source, and confidence against accuracy."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from neural_layers.distill.report.drawing import MARKERS, TEACHER_DASHES, Point, score_limits, styled_figure
from neural_layers.distill.report.line_labels import LineEnd, label_line_ends
from neural_layers.distill.report.numbers import count
from neural_layers.distill.report.style import light

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

DASHES: dict[str, Any] = {"teacher": TEACHER_DASHES, "student": "-", "baseline": (0, (2, 2))}
HATCHES = {"teacher": "///", "student": "", "baseline": "..."}


def length_plot(bins: Sequence[dict[str, Any]]) -> "Figure":
    """chrF of each model by the length of the source; below each length stands how many sentences have it.

    bins: each with `from` and `to` (words; `to` may be None), `sentences`, and the score of each model, None where
    there are no sentences
    """
    with styled_figure(3.4, rows=1) as (figure, (axes,)):
        series = {
            name: [(float(i), one[name]) for i, one in enumerate(bins) if one.get(name) is not None]
            for name in ("teacher", "baseline", "student")
        }
        texts = [f"{length_words(one)}\n{count(one['sentences'])}" for one in bins]
        axes.set_xticks(range(len(bins)), texts, fontsize=9 if len(bins) <= 6 else 8)
        axes.set_xlim(-0.3, len(bins) - 0.7)
        axes.set_xlabel("words of the source, and below it the number of sentences")
        axes.set_ylabel("test chrF")
        axes.grid(axis="y")
        axes.set_axisbelow(True)
        axes.set_ylim(score_limits([value for points in series.values() for _, value in points] or [0.0]))
        label_line_ends(axes, _drawn(axes, series, ".1f"))
        return figure


def length_words(one: dict[str, Any]) -> str:
    """The lengths of a bin: "1–10", or "41 +" for an open one."""
    if one.get("to") is None:
        return f"{one['from']} +"
    return str(one["from"]) if one["from"] == one["to"] else f"{one['from']}–{one['to']}"


def reliability_plot(reliability: dict[str, list[dict[str, Any]]]) -> "Figure":
    """Above, accuracy against confidence for each model, with the diagonal of a model that is right as often as it
    thinks; below, the share of texts at each confidence.

    reliability: for each model its bins, with `from`, `to`, `count`, `confidence` and `accuracy`
    """
    names = [name for name in ("teacher", "baseline", "student") if reliability.get(name)]
    with styled_figure(5.6, rows=2) as (figure, (upper, lower)):
        upper.plot([0, 100], [0, 100], color=light("muted"), linestyle=":", linewidth=1.4)
        series = {
            name: [(100 * one["confidence"], 100 * one["accuracy"]) for one in reliability[name] if one["count"]]
            for name in names
        }
        for axes in (upper, lower):
            axes.set_xlim(0, 100)
            axes.grid(axis="y")
            axes.set_axisbelow(True)
        upper.set_ylim(0, 100)
        upper.set_ylabel("accuracy, %")
        label_line_ends(upper, [*_drawn(upper, series, None), LineEnd(100, 100, "ideal", light("muted"))])
        width = 0.8 / max(len(names), 1)
        for place, name in enumerate(names):
            total = max(sum(one["count"] for one in reliability[name]), 1)
            for one in reliability[name]:
                span = 100 * (one["to"] - one["from"])
                left = 100 * one["from"] + span * (0.1 + width * place)
                lower.bar(
                    left, 100 * one["count"] / total, span * width, align="edge", hatch=HATCHES[name] or None,
                    facecolor=light(name) if name == "student" else "none", edgecolor=light(name), linewidth=0.9,
                )  # fmt: skip
        lower.set_xlabel("confidence, %")
        lower.set_ylabel("texts, %")
        return figure


def _drawn(axes: "Axes", series: dict[str, list[Point]], number: str | None) -> list[LineEnd]:
    """Draw the lines; return their ends."""
    ends = []
    for name, points in series.items():
        if points:
            places, values = zip(*points, strict=True)
            axes.plot(
                places, values, color=light(name), linestyle=DASHES[name], marker=MARKERS[name], markersize=5,
                linewidth=1.8, clip_on=False,
            )  # fmt: skip
            said = "" if number is None else f" {points[-1][1]:{number}}"
            ends.append(LineEnd(*points[-1], name + said, light(name)))
    return ends
