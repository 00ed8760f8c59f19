"""What a search has found: the best trial or the Pareto front, every trial, and a table of them."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from neural_layers.distill.files import save_json
from neural_layers.distill.search.objectives import Objective
from neural_layers.distill.search.plots import history_plot, importance_plot, save_plot, trade_off_plot
from neural_layers.distill.search.search import Search, SearchFailed
from neural_layers.distill.search.study import state_of

if TYPE_CHECKING:
    import optuna

_SHOWN = 10  # trials in the table of a search with one objective


def write_results(search: Search) -> list[Path]:
    """Write `best.json` or, for several objectives, `pareto.json`; `trials.json`; and the plots `history`, `importance`
    and, for several objectives, `trade_off` as PNG and SVG. Returns their paths.

    Raises SearchFailed where no trial came to its end.
    """
    trials, folder = finished_trials(search.study), search.options.out
    best = best_trials(trials, search.objectives)
    if not best:
        raise SearchFailed(_why_nothing(trials))
    found = [_described(search, trial) for trial in best]
    objectives = [{"name": o.name, "direction": o.direction} for o in search.objectives]
    written = [folder / "trials.json"]
    save_json(written[0], [_row(trial) for trial in trials])
    if len(objectives) == 1:
        written.append(folder / "best.json")
        save_json(written[-1], {"objective": {**objectives[0], "value": best[0].values[0]}, **found[0]})
    else:
        written.append(folder / "pareto.json")
        save_json(written[-1], {"objectives": objectives, "front": found})
    names = [parameter.name for parameter in search.parameters]
    plots = {
        "history": history_plot(trials, search.objectives),
        "importance": importance_plot(search.study, names, search.objectives),
    }
    if len(objectives) > 1:
        plots["trade_off"] = trade_off_plot(trials, best, search.objectives)
    for name, figure in plots.items():
        written += [save_plot(figure, folder / "plots" / f"{name}.{kind}") for kind in ("png", "svg")]
    return written


def finished_trials(study: "optuna.Study") -> list["optuna.trial.FrozenTrial"]:
    """Those that are over, in the order of their numbers."""
    return [trial for trial in study.get_trials(deepcopy=False) if trial.state.is_finished()]


def completed(trials: list["optuna.trial.FrozenTrial"]) -> list["optuna.trial.FrozenTrial"]:
    """Those with values of the objectives: neither pruned nor failed."""
    return [trial for trial in trials if state_of(trial) == "completed"]


def best_trials(
    trials: list["optuna.trial.FrozenTrial"], objectives: tuple[Objective, ...]
) -> list["optuna.trial.FrozenTrial"]:
    """The best trial of a search with one objective (the first of equal ones); with several the Pareto front: those
    that no other is at least as good as in all objectives and better in one, sorted by the first objective."""
    done = completed(trials)
    if len(objectives) == 1:
        sign = -1 if objectives[0].direction == "max" else 1
        return sorted(done, key=lambda trial: sign * trial.values[0])[:1]

    def dominates(one: Any, other: Any) -> bool:
        pairs = list(zip(objectives, one.values, other.values, strict=True))
        return not any(o.better(b, a) for o, a, b in pairs) and any(o.better(a, b) for o, a, b in pairs)

    front = [trial for trial in done if not any(dominates(other, trial) for other in done)]
    return sorted(front, key=lambda trial: tuple(trial.values))


def print_results(search: Search) -> None:
    """Print the best trials, or the Pareto front, how many came to nothing, and the command of the first."""
    from rich.console import Console
    from rich.table import Table

    trials, objectives = finished_trials(search.study), search.objectives
    best, done = best_trials(trials, objectives), completed(trials)
    states = [state_of(trial) for trial in trials]
    counts = ", ".join(f"{states.count(state)} {state}" for state in ("completed", "pruned", "failed"))
    shown = best
    if len(objectives) == 1:
        shown = sorted(done, key=lambda t: t.values[0], reverse=objectives[0].direction == "max")[:_SHOWN]
    title = "best trials" if len(objectives) == 1 else "Pareto front"
    table = Table(title=f"search of {search.recipe.name}: {title} ({counts})")
    for heading in ("trial", *(o.name for o in objectives), *(p.name for p in search.parameters)):
        table.add_column(heading, justify="right", overflow="fold")
    for trial in shown:
        values = [f"{value:.6g}" for value in trial.values]
        parameters = [_cell(trial.params.get(p.name)) for p in search.parameters]
        table.add_row(str(trial.number), *values, *parameters)
    Console(width=None if Console().is_terminal else 100).print(table)
    if len(objectives) == 1 and best:
        print(f"again: {search.command(best[0].params, search.options.out / 'best')}")


def _described(search: Search, trial: "optuna.trial.FrozenTrial") -> dict[str, Any]:
    out = search.options.out
    again = out / ("best" if len(search.objectives) == 1 else f"again-{trial.number}")
    return {
        "trial": trial.number,
        "parameters": trial.params,
        "metrics": trial.user_attrs["metrics"],
        "run": str(search.folder.trial_folder(trial.number)),
        "command": search.command(trial.params, again),
    }


def _row(trial: "optuna.trial.FrozenTrial") -> dict[str, Any]:
    row: dict[str, Any] = {"trial": trial.number, "state": state_of(trial), "parameters": trial.params}
    row |= {name: trial.user_attrs[name] for name in ("metrics", "reason") if name in trial.user_attrs}
    if trial.intermediate_values:
        row["validations"] = {str(step): value for step, value in sorted(trial.intermediate_values.items())}
    if trial.duration is not None:
        row["seconds"] = round(trial.duration.total_seconds(), 1)
    return row


def _why_nothing(trials: list["optuna.trial.FrozenTrial"]) -> str:
    reasons = [trial.user_attrs["reason"] for trial in trials if "reason" in trial.user_attrs]
    if reasons:
        return f"{len(reasons)} of {len(trials)} trials failed and none came to its end; the first: {reasons[0]}"
    return f"none of {len(trials)} trials came to its end; raise --prune-after, or --trials"


def _cell(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
