"""What the plots of a report share. They are `Figure` objects without pyplot, so nothing is kept between calls."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from neural_layers.distill.report.style import light

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH_INCHES = 5.6  # of all plots: at a phone's width the 10 point text is still 10 pixels high
# Lines are told apart by dashes, markers and the names at their ends; colours only help.
LINE_STYLES: dict[str, Any] = {
    "student": "-", "baseline": "--", "teacher": "-", "kl": "--", "hard": "-.", "cosine": ":", "mse": (0, (4, 1, 1, 1)),
}  # fmt: skip
TEACHER_DASHES = (0, (6, 3))
MARKERS = {"student": "o", "baseline": "s", "teacher": "^"}

Point = tuple[float, float]


@contextmanager
def styled_figure(height_inches: float, rows: int) -> "Iterator[tuple[Figure, list[Axes]]]":
    """A figure with its axes, one below the other, under the settings of the report and no others."""
    import matplotlib
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    ink = {key: light("ink") for key in ("text.color", "axes.labelcolor", "xtick.labelcolor", "ytick.labelcolor")}
    edges = {key: light("muted") for key in ("axes.edgecolor", "xtick.color", "ytick.color")}
    settings: dict[Any, Any] = {key: value for key, value in matplotlib.rcParamsDefault.items() if key != "backend"}
    settings |= {
        **ink, **edges, "font.family": "DejaVu Sans", "font.size": 10,
        "axes.facecolor": "none", "figure.facecolor": light("paper"), "savefig.facecolor": light("paper"),
        "axes.spines.top": False, "axes.spines.right": False, "grid.color": light("line"), "grid.linewidth": 0.8,
    }  # fmt: skip
    with matplotlib.rc_context(settings):
        figure = Figure(figsize=(WIDTH_INCHES, height_inches), layout="constrained")
        engine = figure.get_layout_engine()
        assert isinstance(engine, ConstrainedLayoutEngine)
        engine.set(hspace=0.08)
        yield figure, list(figure.subplots(rows, 1, squeeze=False)[:, 0])


def draw_line(axes: "Axes", points: Sequence[Point], name: str, marker: str = "") -> None:
    """A line in the look of `name`; markers are left out of long ones."""
    # A line through one point is invisible.
    marker = marker if len(points) <= 40 else ""
    steps, values = zip(*points, strict=True)
    axes.plot(
        steps, values, color=light(name), linestyle=LINE_STYLES[name], marker=marker or "o" * (len(points) == 1),
        markersize=4, linewidth=1.8, clip_on=False,
    )  # fmt: skip


def finish_steps(axes: "Axes", ylabel: str, steps: Sequence[float]) -> None:
    """The axis of training steps, and a grid."""
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    axes.set_xlabel("training step")
    axes.set_ylabel(ylabel)
    axes.set_xlim(0, max([*steps, 1]))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.grid(axis="y")
    axes.set_axisbelow(True)


def say_empty(axes: "Axes", text: str) -> None:
    """Say in the middle of axes that there is nothing to draw."""
    axes.grid(visible=False)
    axes.text(0.5, 0.4, text, transform=axes.transAxes, ha="center", va="center", color=light("muted"))


def score_limits(values: Sequence[float]) -> tuple[float, float]:
    """Limits that show scores: from 0, or from below the lowest where all lie in the upper part of that."""
    low, high = min(values), max(values)
    if high <= 0:
        return (1.1 * low, 0.0) if low < 0 else (0.0, 1.0)
    margin = 0.12 * (high - low) or 0.1 * high
    return (low - margin, high + margin) if low > 0.5 * high else (min(0.0, 1.1 * low), 1.1 * high)
