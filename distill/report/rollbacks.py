"""Rollbacks in curves: marks above the axes, and the training that was given up set apart from what was kept."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from neural_layers.distill.report.drawing import Point
from neural_layers.distill.report.numbers import count
from neural_layers.distill.report.scores import score_named
from neural_layers.distill.report.style import light

if TYPE_CHECKING:
    from matplotlib.axes import Axes

ROW_POINTS = 13.0  # of one row of marks
LABEL_SHARE = 0.09  # of the axes' width: what a label takes


def kept_and_given_up(points: Sequence[Point]) -> tuple[list[Point], list[list[Point]]]:
    """Points in the order of logging as one line of rising steps and the lines that a rollback cut off.

    A point at a step that the line has passed shows that training went back: all from that step on was given up. A
    line that was given up begins at the last point that was kept.
    """
    kept: list[Point] = []
    given_up: list[list[Point]] = []
    for point in points:
        back = next((i for i, (step, _) in enumerate(kept) if step >= point[0]), len(kept))
        if back < len(kept):
            given_up.append(kept[max(back - 1, 0) :])
            del kept[back:]
        kept.append(point)
    return kept, given_up


def draw_given_up(axes: "Axes", lines: Sequence[Sequence[Point]], name: str) -> None:
    """What was given up: thin dots with a cross at each point, or of many points at the last."""
    for line in lines:
        steps, values = zip(*line, strict=True)
        crosses = list(range(1, len(line))) if len(line) <= 8 else [len(line) - 1]
        axes.plot(
            steps, values, color=light(name), linestyle=":", marker="x", markevery=crosses, markersize=5, linewidth=1.0,
            clip_on=False,
        )  # fmt: skip


def mark_rollbacks(axes: "Axes", rollbacks: Sequence[dict[str, Any]]) -> int:
    """A dotted vertical line at each step that was found degraded, and above the axes a triangle with its number and an
    arrow to the step that training went back to. Returns how many rows the marks take.

    The limits of the axes must be final.
    """
    from matplotlib.transforms import ScaledTranslation

    left, right = axes.get_xlim()
    figure = axes.get_figure(root=True)
    assert figure is not None
    color = light("ink")
    ends: list[float] = []  # of each row, where its last mark ends
    for number, rollback in enumerate(rollbacks, start=1):
        step, back = rollback["step"], rollback["to"]
        level = next((i for i, end in enumerate(ends) if end < min(back, step)), len(ends))
        ends[level : level + 1] = [step + LABEL_SHARE * (right - left)]
        # Steps across, and points above the top of the axes, however high those will be.
        above = ScaledTranslation(0, (level + 0.6) * ROW_POINTS / 72, figure.dpi_scale_trans)
        where = axes.get_xaxis_transform() + above
        axes.axvline(step, color=color, linestyle=(0, (1, 2)), linewidth=1.3)
        axes.annotate(
            "", xy=(back, 1), xytext=(step, 1), xycoords=where, textcoords=where, annotation_clip=False,
            arrowprops={"arrowstyle": "->", "color": color, "linewidth": 1.1, "shrinkA": 0, "shrinkB": 0},
        )  # fmt: skip
        axes.plot([step], [1], marker="v", markersize=6, color=color, transform=where, clip_on=False)
        axes.annotate(
            f"R{number}", xy=(step, 1), xycoords=where, xytext=(5, 0), textcoords="offset points", va="center",
            fontsize=9, color=color, annotation_clip=False,
        )  # fmt: skip
    return len(ends)


def rollback_lines(report: dict[str, Any]) -> list[str]:
    """Each rollback in a sentence, numbered as its mark is."""
    return [f"R{number}: {_told(rollback)}" for number, rollback in enumerate(report.get("rollbacks", []), start=1)]


def _told(rollback: dict[str, Any]) -> str:
    metric = score_named(rollback["metric"])
    worse = f"{metric.label} {metric.show(rollback['value'])} after {metric.show(rollback['best'])}"
    if rollback.get("low") is not None and rollback.get("high") is not None:
        worse += f", a difference between {metric.show(rollback['low'])} and {metric.show(rollback['high'])} (95 %)"
    return (
        f"at step {count(rollback['step'])} back to step {count(rollback['to'])}, learning rate "
        f"from then on × {rollback['learning_rate_factor']:g} ({worse})."
    )
