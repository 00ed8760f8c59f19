"""The trade-off of a progressive quantization as a picture."""

from pathlib import Path
from typing import Any

from neural_layers.errors import require
from neural_layers.files import replacing

_WAY, _UNIFORM, _INK, _QUIET, _BAD = "#0b5cad", "#a34a00", "#1c2230", "#566072", "#a61b1b"


def draw(found: Any, path: Path, title: str, score: str) -> None:
    """Write `Progressive` as a PNG."""
    require("matplotlib", extra="train")
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7.2, 4.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    kept = [(found.original.bytes, found.original.score)]
    kept += [(step.bytes, step.score) for step in found.steps if step.kept]
    kept.sort()
    axes.plot(*_columns(kept), color=_WAY, marker="o", markersize=4, linewidth=1, label="layer by layer")
    refused = [(step.bytes, step.score) for step in found.steps if not step.kept]
    if refused:
        axes.plot(*_columns(refused), "x", color=_BAD, markersize=6, label="taken back")
    axes.plot(*_columns([(p.bytes, p.score) for p in found.uniform]), "s", color=_UNIFORM, label="all layers alike")
    for i, point in enumerate(sorted(found.uniform, key=lambda point: point.bytes)):
        # Above and below in turns: 4 bits with and without double quantization lie side by side.
        place, beside = (point.bytes / 1e6, point.score), (0, 8 if i % 2 else -14)
        axes.annotate(point.name, place, beside, textcoords="offset points", ha="center", fontsize=8, color=_UNIFORM)
    axes.plot(*_columns([(found.result.bytes, found.result.score)]), "o", color=_WAY, markersize=9, fillstyle="none")
    if found.floor is not None:
        floor = found.floor * found.original.score
        axes.axhline(floor, color=_QUIET, linewidth=1, linestyle="--", label=f"floor, {found.floor:.0%}")
    if found.target_bytes is not None:
        axes.axvline(found.target_bytes / 1e6, color=_QUIET, linewidth=1, linestyle=":", label="target")
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")
    axes.xaxis.set_minor_formatter("{x:g}")
    axes.set_xlabel("MB of weights (logarithmic)", color=_INK)
    axes.set_ylabel(score, color=_INK)
    axes.tick_params(which="both", labelsize=8, pad=4, colors=_INK)
    axes.margins(0.08, 0.12)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#d5dae3", linewidth=0.5)
    axes.set_title(title, loc="left", fontsize=10, color=_INK)
    axes.legend(frameon=False, fontsize=8, loc="lower right")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as file:
        figure.savefig(file, format="png")


def _columns(points: list[tuple[int, float]]) -> tuple[list[float], list[float]]:
    return [bytes / 1e6 for bytes, _ in points], [score for _, score in points]
