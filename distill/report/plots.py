"""The three plots of a report. They are `Figure` objects without pyplot, so nothing is kept between calls."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from neural_layers.distill.report.line_labels import LineEnd, label_line_ends
from neural_layers.distill.report.numbers import BYTES_PER_MB, digits, score
from neural_layers.distill.report.style import light

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

WIDTH_INCHES = 5.6  # of all plots: at a phone's width the 10 point text is still 10 pixels high
MAX_POINTS = 200
LOG_SCALE_FROM = 30  # the ratio of the largest to the smallest loss
LINE_STYLES: dict[str, Any] = {
    "student": "-", "baseline": "--", "teacher": "-", "kl": "--", "hard": "-.", "cosine": ":", "mse": (0, (4, 1, 1, 1)),
}  # fmt: skip
PART_NAMES = {"loss": "loss", "kl": "KL", "hard": "hard", "cosine": "cosine", "mse": "MSE"}

Point = tuple[float, float]


def quality_plot(report: dict[str, Any]) -> "Figure":
    """Validation BLEU against the training step for student and baseline, with the teacher's BLEU as a dashed line."""
    with styled_figure(3.5, rows=1) as (figure, (axes,)):
        # The student last: where the two lines meet, its own must stay visible.
        ends, series = [], {name: report["validation"].get(name, []) for name in ("baseline", "student")}
        for name, entries in series.items():
            points = [(entry["step"], entry["bleu"]) for entry in entries]
            if points:
                _draw(axes, points, name, marker="os"[name == "baseline"])
                ends.append(LineEnd(*points[-1], f"{name} {score(points[-1][1])}", light(name)))
        teacher_bleu, _ = teacher_line(report)
        _finish(axes, "validation BLEU", [entry["step"] for entries in series.values() for entry in entries])
        top = max([teacher_bleu, *(entry["bleu"] for entries in series.values() for entry in entries)])
        axes.set_ylim(0, 1.1 * top or 1.0)
        axes.axhline(teacher_bleu, color=light("teacher"), linestyle=(0, (6, 3)), linewidth=1.6)
        ends.append(LineEnd(axes.get_xlim()[1], teacher_bleu, f"teacher {score(teacher_bleu)}", light("teacher")))
        if not any(series.values()):
            _say_empty(axes, "no validation was logged")
        label_line_ends(axes, ends)
        return figure


def teacher_line(report: dict[str, Any]) -> tuple[float, str]:
    """The teacher's BLEU for the dashed line and the set it comes from, `validation` if logged and `test` if not."""
    if report["validation"].get("teacher"):
        return max(point["bleu"] for point in report["validation"]["teacher"]), "validation"
    return report["models"]["teacher"]["quality"]["bleu"], "test"


def loss_plot(report: dict[str, Any]) -> "Figure":
    """Training losses against the step: above the student's and its parts, below the teacher's and the baseline's."""
    logs = report["training_log"]
    student = {part: _points(logs.get("student", []), part) for part in PART_NAMES}
    others = {name: _points(logs.get(name, []), "loss") for name in ("teacher", "baseline")}
    with styled_figure(6.4, rows=2) as (figure, (upper, lower)):
        colors = {part: "student" if part == "loss" else part for part in PART_NAMES}
        _loss_lines(upper, student, colors, PART_NAMES)
        _loss_lines(lower, others, {name: name for name in others}, {name: name for name in others})
        upper.set_title("student: loss and its parts", fontsize=10.5, loc="left", color=light("ink"))
        rest = "teacher and baseline" if others["baseline"] else "teacher"
        lower.set_title(f"{rest}: loss", fontsize=10.5, loc="left", color=light("ink"))
        return figure


def cost_plot(report: dict[str, Any]) -> "Figure":
    """File size and latency of teacher and student as bars; a thin line reaches from the p50 to the p95 latency."""
    names = ("teacher", "student")
    models = [report["models"][name] for name in names]
    sizes = [model["file_bytes"] / BYTES_PER_MB for model in models]
    p50s, p95s = ([model["latency_ms"][key] for model in models] for key in ("p50", "p95"))
    with styled_figure(3.1, rows=2) as (figure, (upper, lower)):
        _bars(upper, names, sizes, sizes, [digits(size) for size in sizes])
        upper.set_xlabel("file size, MB")
        texts = [f"p50 {digits(p50)}, p95 {digits(p95)}" for p50, p95 in zip(p50s, p95s, strict=True)]
        _bars(lower, names, p50s, p95s, texts)
        lower.set_xlabel("latency per sentence, ms")
        return figure


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


def _draw(axes: "Axes", points: list[Point], name: str, marker: str = "") -> None:
    # A line through one point is invisible.
    marker = marker if len(points) <= 40 else ""
    steps, values = zip(*points, strict=True)
    axes.plot(
        steps, values, color=light(name), linestyle=LINE_STYLES[name], marker=marker or "o" * (len(points) == 1),
        markersize=4, linewidth=1.8, clip_on=False,
    )  # fmt: skip


def _points(log: list[dict[str, Any]], key: str) -> list[Point]:
    """Step and value of the entries that have the key, as means of neighbours where there are too many to draw."""
    points = [(entry["step"], entry[key]) for entry in log if entry.get(key) is not None]
    block = -(-len(points) // MAX_POINTS) or 1
    groups = [points[start : start + block] for start in range(0, len(points), block)]
    return [(group[-1][0], sum(value for _, value in group) / len(group)) for group in groups]


def _loss_lines(axes: "Axes", series: dict[str, list[Point]], colors: dict[str, str], names: dict[str, str]) -> None:
    ends = []
    for key, points in series.items():
        if points:
            _draw(axes, points, colors[key])
            ends.append(LineEnd(*points[-1], f"{names[key]} {digits(points[-1][1])}", light(colors[key])))
    values = [value for points in series.values() for _, value in points]
    _finish(axes, "training loss", [step for points in series.values() for step, _ in points])
    if not values:
        _say_empty(axes, "no training was logged")
    elif min(values) > 0 and max(values) / min(values) >= LOG_SCALE_FROM:
        axes.set_yscale("log")
        axes.set_ylabel("training loss (log scale)")
    elif min(values) >= 0:
        axes.set_ylim(0, 1.05 * max(values) or 1.0)
    label_line_ends(axes, ends)


def _finish(axes: "Axes", ylabel: str, steps: list[int | float]) -> None:
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    axes.set_xlabel("training step")
    axes.set_ylabel(ylabel)
    axes.set_xlim(0, max([*steps, 1]))
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5, integer=True))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    axes.grid(axis="y")
    axes.set_axisbelow(True)


def _say_empty(axes: "Axes", text: str) -> None:
    axes.grid(visible=False)
    axes.text(0.5, 0.4, text, transform=axes.transAxes, ha="center", va="center", color=light("muted"))


def _bars(axes: "Axes", names: tuple[str, ...], lengths: list[float], reaches: list[float], texts: list[str]) -> None:
    """Horizontal bars, each with a thin line on to its reach and a text after that."""
    from matplotlib.ticker import MaxNLocator, StrMethodFormatter

    colors = [light(name) for name in names]
    axes.barh(names, lengths, color=colors, height=0.6)
    axes.hlines(names, lengths, reaches, colors=colors, linewidth=2.5)
    for name, length, reach, text in zip(names, lengths, reaches, texts, strict=True):
        axes.annotate(text, (max(length, reach), name), xytext=(5, 0), textcoords="offset points", va="center")
    # The texts stand right of the bars: room for the longest, about 24 characters.
    axes.set_xlim(0, 1.6 * max([*lengths, *reaches]) or 1.0)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axes.invert_yaxis()
    axes.tick_params(axis="y", length=0)
