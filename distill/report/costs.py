"""Plots of cost: teacher and student side by side, and quality against size and latency for compressed forms."""

from typing import TYPE_CHECKING, Any

from neural_layers.distill.report.drawing import TEACHER_DASHES, say_empty, score_limits, styled_figure
from neural_layers.distill.report.line_labels import LineEnd, label_line_ends
from neural_layers.distill.report.numbers import BYTES_PER_MB, digits
from neural_layers.distill.report.scores import gate_metric, score_named
from neural_layers.distill.report.style import light

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORM_MARKERS = "sDvP*Xhd<>"  # of the compressed forms; the teacher's and the student's are ^ and o
LOG_SCALE_FROM = 8.0  # the ratio of the largest to the smallest size


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
        lower.set_xlabel(f"latency per {noun(report)}, ms")
        return figure


def noun(report: dict[str, Any]) -> str:
    """What one example is called."""
    return {"translation": "sentence", "language": "sequence"}.get(report.get("task", "translation"), "text")


def compression_plot(report: dict[str, Any]) -> "Figure":
    """The score that counts against file size and against p50 latency: teacher, student and each compressed form.

    A form that lost too much is hollow, and its name says so; the dashed line is what the gate asks for.
    """
    metric = gate_metric(report)
    shown = score_named(metric)
    entries = _entries(report, metric)
    with styled_figure(6.6, rows=2) as (figure, both):
        for axes, key, label in zip(both, ("size", "latency"), _labels(report), strict=True):
            points = [entry for entry in entries if entry[key] is not None]
            teacher = report["models"]["teacher"]["quality"].get(metric)
            least = report.get("gate", {}).get("min_retention")
            asked = None if teacher is None or least is None or shown.better != "higher" else least * teacher
            axes.set_xlabel(label)
            axes.set_ylabel(f"test {shown.label}" + ", %" * (shown.scale == 100))
            axes.grid(axis="both")
            axes.set_axisbelow(True)
            if not points:
                say_empty(axes, "nothing was measured")
                continue
            heights = [shown.scale * entry["quality"] for entry in points]
            axes.set_ylim(score_limits([*heights, *([] if asked is None else [shown.scale * asked])]))
            _across(axes, [entry[key] for entry in points])
            ends = [_point(axes, entry, entry[key], height) for entry, height in zip(points, heights, strict=True)]
            if asked is not None:
                axes.axhline(shown.scale * asked, color=light("muted"), linestyle=TEACHER_DASHES, linewidth=1.2)
                text = f"asked for {shown.show(asked)}"
                ends.append(LineEnd(axes.get_xlim()[1], shown.scale * asked, text, light("muted")))
            label_line_ends(axes, ends)
        return figure


def _labels(report: dict[str, Any]) -> tuple[str, str]:
    return "file size, MB", f"latency per {noun(report)} (p50), ms"


def _entries(report: dict[str, Any], metric: str) -> list[dict[str, Any]]:
    """Name, look, score, size in MB and p50 of the teacher, the student and the forms that have the score."""
    forms = {entry["variant"]: entry for entry in report["compression"]}
    measured = {name: report["models"][name] for name in ("teacher", "student") if name not in forms} | forms
    entries, markers = [], iter(FORM_MARKERS)
    for name, one in measured.items():
        marker = {"teacher": "^", "student": "o"}.get(name) or next(markers, "8")
        quality = (one["quality"] or {}).get(metric)
        if quality is None:
            continue
        size, latency = one.get("file_bytes"), one.get("latency_ms")
        entries.append(
            {
                "name": name, "marker": marker, "quality": quality, "failed": one.get("passed") is False,
                "size": None if size is None else size / BYTES_PER_MB,
                "latency": None if latency is None else latency["p50"],
            }
        )  # fmt: skip
    return entries


def _across(axes: "Axes", places: list[float]) -> None:
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

    low, high = min(places), max(places)
    if low > 0 and high / low >= LOG_SCALE_FROM:
        axes.set_xscale("log")
        axes.set_xlim(low / 1.3, high * 1.15)
        axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0), numticks=12))
        axes.xaxis.set_minor_formatter(NullFormatter())
    else:
        axes.set_xlim(0, 1.1 * high or 1.0)
        axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))


def _point(axes: "Axes", entry: dict[str, Any], place: float, height: float) -> LineEnd:
    color = light(entry["name"]) if entry["name"] in ("teacher", "student") else light("ink")
    face = "none" if entry["failed"] else color
    axes.plot(
        [place], [height], linestyle="", marker=entry["marker"], markersize=8, markerfacecolor=face,
        markeredgecolor=color, markeredgewidth=1.6, clip_on=False,
    )  # fmt: skip
    return LineEnd(place, height, entry["name"] + " (failed)" * entry["failed"], color)


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
