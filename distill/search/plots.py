"""Plots of a search: its history, what its parameters matter, and the trade-off between objectives."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neural_layers.distill.files import replacing
from neural_layers.distill.report.drawing import say_empty, styled_figure
from neural_layers.distill.report.style import light
from neural_layers.distill.search.objectives import Objective
from neural_layers.distill.search.study import state_of

if TYPE_CHECKING:
    import optuna
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    Trials = list[optuna.trial.FrozenTrial]

_LOG_FROM = 30.0  # the ratio of the largest to the smallest value
_TELLING = 8  # completed trials that importances need


def save_plot(figure: "Figure", path: Path) -> Path:
    """Write a figure to `path`, whose name ends in .png or .svg; return it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as beside:
        figure.savefig(beside, format=path.suffix.removeprefix("."), dpi=150)
    return path


def history_plot(trials: "Trials", objectives: tuple[Objective, ...]) -> "Figure":
    """Each trial's values as dots over its number, with the best so far as a line; pruned trials are crosses at the
    last validation they came to, failed ones short lines at the foot."""
    with styled_figure(1.2 + 2.5 * len(objectives), rows=len(objectives)) as (figure, rows):
        for i, (axes, objective) in enumerate(zip(rows, objectives, strict=True)):
            done = [(t.number, t.values[i]) for t in trials if state_of(t) == "completed"]
            pruned = [(t.number, _last(t)) for t in trials if state_of(t) == "pruned" and t.intermediate_values]
            failed = [t.number for t in trials if state_of(t) == "failed"]
            _dots(axes, done, "completed", marker="o", color=light("student"))
            _dots(axes, pruned, "pruned", marker="x", color=light("bad"))
            _limits(axes, [value for _, value in done], [value for _, value in pruned])
            if failed:
                foot = axes.get_xaxis_transform()
                axes.plot(
                    failed, [0.03] * len(failed), "|", color=light("ink"), markersize=9, label="failed", transform=foot
                )
            _best_so_far(axes, done, objective)
            axes.set_ylabel(f"{objective.name} ({'lower' if objective.direction == 'min' else 'higher'} is better)")
            _number_axis(axes, trials)
            _plain_numbers(axes.yaxis, [value for _, value in done])
        rows[-1].set_xlabel("trial")
        _legend(figure, rows[0])
        return figure


def importance_plot(study: "optuna.Study", names: list[str], objectives: tuple[Objective, ...]) -> "Figure":
    """How much of the difference between the best quarter of the trials and all of them each parameter makes, in shares
    that add up to 1 (PED-ANOVA, arXiv 2304.10255); one row for each objective."""
    height = 1.0 + len(objectives) * (0.9 + 0.33 * len(names))
    with styled_figure(height, rows=len(objectives)) as (figure, rows):
        for i, (axes, objective) in enumerate(zip(rows, objectives, strict=True)):
            shares = _importances(study, i, objective)
            axes.set_title(f"what matters to {objective.name}", fontsize=10.5, loc="left", color=light("ink"))
            if not shares:
                axes.set_axis_off()
                say_empty(axes, f"fewer than {_TELLING} trials came to their end")
                continue
            ordered = sorted(shares, key=lambda name: shares[name])
            axes.barh(ordered, [shares[name] for name in ordered], color=light("student"), height=0.6)
            for place, name in enumerate(ordered):
                axes.annotate(
                    f"{shares[name]:.0%}", (shares[name], place), xytext=(5, 0), textcoords="offset points", va="center"
                )
            axes.set_xlim(0, 1.12 * max(max(shares.values()), 0.01))
            axes.tick_params(axis="y", length=0)
            _percent_axis(axes)
        rows[-1].set_xlabel("share of the importance")
        return figure


def trade_off_plot(trials: "Trials", front: "Trials", objectives: tuple[Objective, ...]) -> "Figure":
    """The first objective over each of the others: every trial, and the Pareto front as filled points with the trials'
    numbers, joined by a line where there are two objectives (with more, a front is no line)."""
    first, *others = objectives
    with styled_figure(0.9 + 3.0 * len(others), rows=len(others)) as (figure, rows):
        for i, (axes, other) in enumerate(zip(rows, others, strict=True), start=1):
            rest = [t for t in trials if state_of(t) == "completed" and t not in front]
            _dots(
                axes, [(t.values[i], t.values[0]) for t in rest], "other trials", marker="o", markerfacecolor="none",
                color=light("muted"),
            )  # fmt: skip
            points = sorted((t.values[i], t.values[0], t.number) for t in front)
            if len(others) == 1:
                axes.plot(
                    [x for x, *_ in points], [y for _, y, _ in points], drawstyle=_corner(other),
                    color=light("teacher"), linewidth=1.4, linestyle=(0, (5, 3)),
                )  # fmt: skip
            _dots(axes, [(x, y) for x, y, _ in points], "Pareto front", marker="D", color=light("teacher"))
            _scale(axes, [t.values[i] for t in [*rest, *front]])
            axes.set_xlabel(f"{other.name} ({'lower' if other.direction == 'min' else 'higher'} is better)")
            axes.set_ylabel(f"{first.name} ({'lower' if first.direction == 'min' else 'higher'} is better)")
            axes.grid(axis="both")
            axes.set_axisbelow(True)
            axes.margins(0.12)
            _number_points(axes, points, first, other)
        _legend(figure, rows[0])
        return figure


def _number_points(axes: "Axes", points: list[tuple[float, float, int]], first: Objective, other: Objective) -> None:
    """Write the trials' numbers on the side of a front where it has no other points, as far as they have room."""
    up, side = 1 if first.direction == "max" else -1, -1 if other.direction == "min" else 1
    to_axes, written = axes.transData + axes.transAxes.inverted(), list[Any]()
    for x, y, number in points:
        place = to_axes.transform((x, y))
        if any(abs(place[0] - at[0]) < 0.05 and abs(place[1] - at[1]) < 0.05 for at in written):
            continue
        written.append(place)
        axes.annotate(
            f"{number}", (x, y), xytext=(4 * side, 6 * up), textcoords="offset points", fontsize=9,
            ha="right" if side < 0 else "left", va="bottom" if up > 0 else "top",
        )  # fmt: skip


def _last(trial: Any) -> float:
    return float(trial.intermediate_values[max(trial.intermediate_values)])


def _dots(axes: "Axes", points: Sequence[tuple[float, float]], label: str, **look: Any) -> None:
    if points:
        xs, ys = zip(*points, strict=True)
        axes.plot(xs, ys, linestyle="", markersize=6, markeredgewidth=1.5, label=label, **look)


def _best_so_far(axes: "Axes", done: Sequence[tuple[float, float]], objective: Objective) -> None:
    best, line = None, []
    for number, value in done:
        best = value if best is None or objective.better(value, best) else best
        line.append((number, best))
    if line:
        xs, ys = zip(*line, strict=True)
        axes.step(xs, ys, where="post", color=light("teacher"), linewidth=1.6, label="best so far")


def _limits(axes: "Axes", done: list[float], pruned: list[float]) -> None:
    """Let the trials that came to their end fill the axes: one that diverged would press them into a line."""
    values = sorted([*done, *pruned])
    if len(values) < 2 or values[0] == values[-1]:
        return
    kept = values
    if len(values) >= 8:
        low, high = values[len(values) // 4], values[(3 * len(values)) // 4]
        reach = 4 * (high - low)
        kept = [value for value in values if low - reach <= value <= high + reach] or values
    margin = 0.1 * (kept[-1] - kept[0]) or 0.1 * abs(kept[0]) or 1.0
    axes.set_ylim(kept[0] - margin, kept[-1] + margin)
    outside = len(values) - len(kept)
    if outside:
        axes.set_title(f"{outside} far off are not shown", fontsize=9, loc="right", color=light("muted"))


def _number_axis(axes: "Axes", trials: "Trials") -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlim(-0.5, max([t.number for t in trials], default=0) + 0.5)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=8, integer=True))
    axes.grid(axis="y")
    axes.set_axisbelow(True)


def _percent_axis(axes: "Axes") -> None:
    from matplotlib.ticker import MaxNLocator, PercentFormatter

    axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
    axes.xaxis.set_major_formatter(PercentFormatter(1.0, decimals=0))
    axes.grid(axis="x")
    axes.set_axisbelow(True)


def _scale(axes: "Axes", values: list[float]) -> None:
    from matplotlib.ticker import MaxNLocator

    if values and min(values) > 0 and max(values) / min(values) >= _LOG_FROM:
        axes.set_xscale("log")
        return
    axes.xaxis.set_major_locator(MaxNLocator(nbins=5))
    _plain_numbers(axes.xaxis, values)


def _plain_numbers(axis: Any, values: list[float]) -> None:
    from matplotlib.ticker import StrMethodFormatter

    if values and max(map(abs, values)) >= 1000:
        axis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))


def _corner(other: Objective) -> Any:
    """How the line of a front goes from a point to the next, so that it lies on what the two points dominate."""
    # Where less is better, what a point reaches holds to its right, until the next point.
    return "steps-post" if other.direction == "min" else "steps-pre"


def _legend(figure: "Figure", axes: "Axes") -> None:
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        figure.legend(handles, labels, loc="outside upper left", ncols=4, frameon=False, fontsize=9, handletextpad=0.4)


def _importances(study: "optuna.Study", index: int, objective: Objective) -> dict[str, float]:
    """The shares by parameter; nothing where there are too few trials to tell."""
    import warnings

    import optuna

    done = [t for t in study.get_trials(deepcopy=False) if state_of(t) == "completed"]
    if len(done) < _TELLING or len({t.values[index] for t in done}) < 2:
        return {}
    sign = 1 if objective.direction == "min" or len(study.directions) == 1 else -1  # it takes the lowest for the best
    # The best quarter: of the usual tenth, one or two trials of a short search would say it all.
    evaluator = optuna.importance.PedAnovaImportanceEvaluator(target_quantile=0.25, evaluate_on_local=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        found = optuna.importance.get_param_importances(
            study, evaluator=evaluator, target=None if len(study.directions) == 1 else lambda t: sign * t.values[index]
        )
    return {} if not all(share == share for share in found.values()) else dict(found)
