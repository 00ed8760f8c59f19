"""The table and the plot of docs/conversion.md. The plot is a `Figure` without pyplot: nothing outlives a call."""

import math
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_CURVES = {
    "random": ("replaced layers at random, distilled", "#5c5c5c", ":"),
    "text alone": ("converted, trained on the text alone", "#a34a00", "--"),
    "distilled": ("converted, distilled from the original", "#0b5cad", "-"),
}


def plot(result: dict[str, Any]) -> "Figure":
    """Validation loss against steps for the three hybrids, with the original's as a line."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    with rc_context({"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure = Figure(figsize=(7.2, 4.2), layout=ConstrainedLayoutEngine())
        axes = figure.subplots()
        for name, (label, color, style) in _CURVES.items():
            steps, losses = zip(*result["curves"][name], strict=True)
            label = f"{label}: {losses[0]:.3f} → {losses[-1]:.3f}"
            axes.plot(steps, losses, color=color, linestyle=style, marker="o", markersize=3.5, label=label)
        original = result["original"]
        axes.axhline(original, color="#6a3fa0", linewidth=1.4, label=f"the original: {original:.3f}")
        axes.plot([0], [result["carried"]], "x", color="#0b5cad", markersize=8, label=_carried(result))
        axes.set_xlabel("training step of the hybrid")
        axes.set_ylabel("validation loss, nats a character")
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=9)
        return figure


def _carried(result: dict[str, Any]) -> str:
    return f"weights carried, nothing fitted: {result['carried']:.3f}"


def table(result: dict[str, Any]) -> str:
    """The validation losses as a Markdown table."""
    steps = result["options"]["steps"]
    rows = [
        ("the original, in transformers", result["transformers"]),
        ("the original, loaded by `from_transformers`", result["original"]),
        ("half of its layers converted, weights carried, nothing fitted", result["carried"]),
        ("converted, as `convert_to_hybrid` returns it", result["fitted"]),
        (f"… and distilled from the original, {steps} steps", result["curves"]["distilled"][-1][1]),
        (f"… and trained on the text alone, {steps} steps", result["curves"]["text alone"][-1][1]),
        ("the replaced layers at random instead", result["curves"]["random"][0][1]),
        (f"… and distilled from the original, {steps} steps", result["curves"]["random"][-1][1]),
    ]
    lines = [f"| {name} | {loss:.3f} | {math.exp(loss):.2f} |" for name, loss in rows]
    return "\n".join(["| | validation loss | perplexity |", "|---|---:|---:|", *lines])
