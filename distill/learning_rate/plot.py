"""The curve of a range test as a picture."""

from pathlib import Path
from typing import TYPE_CHECKING

from neural_layers.distill.files import replacing
from neural_layers.distill.learning_rate.curve import LearningRateCurve
from neural_layers.distill.report.drawing import styled_figure
from neural_layers.distill.report.style import light
from neural_layers.errors import InputError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_ABOVE = 1.15  # times the first loss: what is higher has diverged, and would flatten the rest


def curve_plot(curve: LearningRateCurve) -> "Figure":
    """Losses as dots and the smoothed loss as a line over the logarithm of the rate, with the suggestion dashed."""
    with styled_figure(3.5, rows=1) as (figure, (axes,)):
        axes.set_xscale("log")
        axes.plot(curve.rates, curve.losses, ".", color=light("muted"), markersize=3)
        axes.plot(curve.rates, curve.smoothed, color=light("student"), linewidth=1.8)
        low, high = min(curve.smoothed), max(curve.smoothed[0], min(curve.smoothed)) * _ABOVE
        margin = 0.1 * (high - low) or 0.1
        axes.set_ylim(low - margin, high + margin)
        axes.set_xlabel("learning rate")
        axes.set_ylabel("training loss, smoothed")
        axes.grid(axis="y")
        axes.set_axisbelow(True)
        if curve.suggestion is None:
            axes.set_title("the loss falls nowhere: no suggestion", fontsize=10.5, loc="left", color=light("ink"))
        else:
            axes.axvline(curve.suggestion, color=light("teacher"), linestyle=(0, (6, 3)), linewidth=1.6)
            title = f"suggestion (dashed): {curve.suggestion:.2g}, where the loss falls steepest"
            axes.set_title(title, fontsize=10.5, loc="left", color=light("ink"))
        return figure


def save_curve(curve: LearningRateCurve, path: Path) -> Path:
    """Write the plot to `path`, whose name ends in .png or .svg; return it. Raises InputError for another ending."""
    kind = path.suffix.lower().removeprefix(".")
    if kind not in ("png", "svg"):
        raise InputError(f"{path}: a plot is written as .png or .svg; give it one of these endings")
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as beside:
        curve_plot(curve).savefig(beside, format=kind, dpi=150)
    return path
