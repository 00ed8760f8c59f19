"""Names written at the ends of lines instead of a legend, moved apart where the lines end close together."""

from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

LINE_HEIGHT = 1.35  # of the font size


@dataclass(frozen=True)
class LineEnd:
    """Where a line ends, in the units of its axes, and what to write there."""

    x: float
    y: float
    text: str
    color: str


def spread(wanted: list[float], gap: float) -> list[float]:
    """Places within 0..1, each at least `gap` above the one before it and near the wanted ones.

    wanted: in ascending order
    gap:    taken smaller where the places would not fit otherwise

    Pushing upwards keeps the gaps, pushing downwards does too, and so does their mean, which is the fair one.
    """
    last = len(wanted) - 1
    if last > 0:
        gap = min(gap, 1 / last)
    upwards = list(accumulate(wanted, lambda below, own: max(own, below + gap)))
    downwards = list(accumulate(reversed(wanted), lambda above, own: min(own, above - gap)))[::-1]
    means = [(up + down) / 2 for up, down in zip(upwards, downwards, strict=True)]
    return [min(max(mean, i * gap), 1 - (last - i) * gap) for i, mean in enumerate(means)]


def label_line_ends(axes: "Axes", ends: list[LineEnd]) -> None:
    """Write each end's text right of the axes, joined to the end by a thin line.

    The limits of the axes must be final. A figure with constrained layout makes room for the texts.
    """
    figure = axes.get_figure(root=True)
    assert figure is not None
    engine = figure.get_layout_engine()
    if engine is not None:
        engine.execute(figure)  # lays the axes out, so that their height is known
    to_axes = axes.transData + axes.transAxes.inverted()
    placed = sorted(((float(to_axes.transform((end.x, end.y))[1]), end) for end in ends), key=lambda pair: pair[0])
    size_points = 10.0
    height_points = axes.get_window_extent().height * 72 / figure.dpi
    heights = spread([height for height, _ in placed], LINE_HEIGHT * size_points / height_points)
    for height, (_, end) in zip(heights, placed, strict=True):
        axes.annotate(
            end.text,
            xy=(end.x, end.y),
            xytext=(1.04, height),
            textcoords="axes fraction",
            va="center",
            fontsize=size_points,
            color=end.color,
            annotation_clip=False,
            arrowprops={"arrowstyle": "-", "color": end.color, "linewidth": 0.7, "relpos": (0, 0.5), "shrinkB": 0},
        )
