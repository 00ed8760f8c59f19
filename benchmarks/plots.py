"""The results over their sizes, log-log, one picture a case. `Figure` objects without pyplot: nothing is kept between
calls, and the same results give the same picture."""

import io
import math
from typing import TYPE_CHECKING, Any

from neural_layers.benchmarks.case import OURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Result = dict[str, Any]

PANELS = (
    ("forward", "forward, ms"),
    ("both", "forward + backward, ms"),
    ("memory", "peak memory above the inputs, MB"),
)
_OURS = ("#0b5cad", "#3f9be0", "#00706b", "#6a3fa0")
_PEERS = ("#d1495b", "#e08e2b", "#7d6b2b", "#9c1f8a", "#5c5c5c", "#b0784a")
_MARKERS = "osD^vP*X"
_LIMIT: dict[str, Any] = {"color": "#222222", "linestyle": (0, (4, 2)), "linewidth": 1.2}
_TICKS_AT_MOST = 6


def plot_case(case: Result, title: str) -> "Figure | None":
    """Time and memory of every contender over the case's axis, or None where it has fewer than two sizes."""
    from matplotlib import rc_context, rcParamsDefault
    from matplotlib.figure import Figure
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    if len(case["rows"]) < 2:
        return None
    panels = [(key, label) for key, label in PANELS if _has(case, key)]
    settings: dict[Any, Any] = {key: value for key, value in rcParamsDefault.items() if key != "backend"}
    settings |= {"font.family": "DejaVu Sans", "font.size": 9, "axes.spines.top": False, "axes.spines.right": False}
    with rc_context(settings):
        figure = Figure(figsize=(3.7 * len(panels) + 0.3, 3.9), layout=ConstrainedLayoutEngine(w_pad=0.08, h_pad=0.06))
        for axes, (key, label) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            _draw(axes, case, key)
            _label(axes, case, label)
        figure.suptitle(title, fontsize=10)
        _legend(figure)
        figure.draw_without_rendering()
        return figure


def png(figure: "Figure") -> bytes:
    """The picture, without the version and date that matplotlib would put in."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    return buffer.getvalue()


def _value(entry: Result, key: str) -> float | None:
    """What a panel shows of a contender at a size: milliseconds, or the megabytes of the most that was measured."""
    if key != "memory":
        return entry[key]["median"] * 1e3 if key in entry else None
    memory = entry.get("memory", {})
    value = memory.get("both", memory.get("forward"))
    return None if value is None else max(value, 0.1)  # a logarithm needs something


def _has(case: Result, key: str) -> bool:
    entries = [entry for row in case["rows"] for entry in row["contenders"].values()]
    return any(_value(entry, key) is not None for entry in entries)


def _draw(axes: "Axes", case: Result, key: str) -> None:
    names = list(dict.fromkeys(name for row in case["rows"] for name in row["contenders"]))
    ours = [name for name in names if name.startswith(OURS)]
    peers = [name for name in names if name not in ours]
    # Ours last: where lines meet, they stay visible.
    for group, colors, width in ((peers, _PEERS, 1.3), (ours, _OURS, 2.2)):
        for i, name in enumerate(group):
            entries = [(row["size"][case["axis"]], row["contenders"].get(name, {})) for row in case["rows"]]
            points = [(x, y) for x, entry in entries if (y := _value(entry, key)) is not None]
            if not points or (key == "memory" and not _same_mode(case, name)):
                continue
            xs, ys = zip(*points, strict=True)
            marker = _MARKERS[(i + (4 if group is peers else 0)) % len(_MARKERS)]
            axes.plot(xs, ys, marker=marker, markersize=4.5, color=colors[i % len(colors)], linewidth=width, label=name)
            if key != "memory":
                _draw_spread(axes, entries, key, colors[i % len(colors)])
    limits = [(row["size"][case["axis"]], _value(row["limit"], key)) for row in case["rows"]]
    points = [(x, y) for x, y in limits if y is not None]
    if points and key != "memory":
        axes.plot(*zip(*points, strict=True), **_LIMIT, label=f"limit: {case['limit']}")


def _same_mode(case: Result, name: str) -> bool:
    """Whether a contender's memory is of what our own is of: beside forward + backward, forward alone says nothing."""
    return not case["backward"] or any(
        "both" in row["contenders"].get(name, {}).get("memory", {}) for row in case["rows"]
    )


def _draw_spread(axes: "Axes", entries: list[tuple[int, Result]], key: str, color: str) -> None:
    timed = [(x, entry[key]) for x, entry in entries if key in entry]
    lower, upper = ([times[end] * 1e3 for _, times in timed] for end in ("lower", "upper"))
    axes.vlines([x for x, _ in timed], lower, upper, color=color, linewidth=1)


def _label(axes: "Axes", case: Result, label: str) -> None:
    from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

    axes.set_xscale("log")
    axes.set_yscale("log")
    sizes = [row["size"][case["axis"]] for row in case["rows"]]
    axes.set_xlim(min(sizes) / 1.15, max(sizes) * 1.15)
    shown = sizes[:: math.ceil(len(sizes) / _TICKS_AT_MOST)]
    axes.xaxis.set_major_locator(FixedLocator(shown))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.0f}"))
    _label_times(axes)
    axes.set_xlabel(case["axis"])
    axes.set_title(label, fontsize=9.5, loc="left")
    axes.grid(color="#d9dde4", linewidth=0.7)
    axes.set_axisbelow(True)


def _label_times(axes: "Axes") -> None:
    """Labels at whole decades; at 2 and 5 too where there would be fewer than two."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter, NullLocator

    low, high = axes.get_ylim()
    if high / low < 4:
        low, high = low / 1.6, high * 1.6
        axes.set_ylim(low, high)
    wide = math.floor(math.log10(high)) - math.ceil(math.log10(low)) >= 1
    axes.yaxis.set_major_locator(LogLocator(subs=(1.0,) if wide else (1.0, 2.0, 5.0)))
    axes.yaxis.set_minor_locator(LogLocator(subs=range(2, 10)) if wide else NullLocator())
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())


def _legend(figure: "Figure") -> None:
    """One for all panels, below them."""
    handles: dict[str, Any] = {}
    for axes in figure.axes:
        for handle, label in zip(*axes.get_legend_handles_labels(), strict=True):
            handles.setdefault(label, handle)
    ordered = sorted(handles, key=lambda label: (label.startswith("limit"), not label.startswith(OURS)))
    columns = min(4 if len(figure.axes) > 2 else 3, len(ordered))
    figure.legend(
        [handles[label] for label in ordered], ordered, loc="outside lower center", ncols=columns, frameon=False
    )
