"""Plots of language model runs: loss against step and against time, by position, and by context.

`python -m neural_layers.distill.report.language_plots losses --out FILE.png NAME=RUN …` draws several runs into one
picture, `… positions --out FILE.png NAME=EVALUATION.json …` their loss by position, and `… contexts --out FILE.png
'NAME=FOLDER/*.json' …` the loss of one text read with several contexts, from evaluations of each.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neural_layers.distill.report.drawing import styled_figure
from neural_layers.distill.report.line_labels import LineEnd, label_line_ends
from neural_layers.distill.report.style import light

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Told apart by dashes and markers too.
_LOOKS = [("student", "-", "o"), ("baseline", "--", "s"), ("teacher", "-.", "^"), ("kl", ":", "D"), ("hard", "-", "v")]
Line = tuple[list[float], list[float]]


def losses_plot(runs: dict[str, Path]) -> "Figure":
    """Validation loss of each run against the training step, and against minutes of training."""
    read = {name: _run(folder) for name, folder in runs.items()}
    with styled_figure(6.4, rows=2) as (figure, (upper, lower)):
        _lines(upper, {name: (steps, losses) for name, (steps, _, losses) in read.items()})
        upper.set_xlabel("training step")
        _lines(lower, {name: (minutes, losses) for name, (_, minutes, losses) in read.items()})
        lower.set_xlabel("minutes of training")
        for axes in (upper, lower):
            axes.set_ylabel("validation loss")
        return figure


def positions_plot(evaluations: dict[str, Path]) -> "Figure":
    """Mean loss against how many tokens of the document came before, from files of `neural-layers evaluate --json`."""
    lines: dict[str, Line] = {}
    for name, path in evaluations.items():
        rows = json.loads(path.read_text())["loss_by_position"]
        lines[name] = [row["first"] for row in rows], [row["loss"] for row in rows]
    return _over_counts(lines, "tokens of the document before (at least)", "loss")


def contexts_plot(evaluations: dict[str, Path]) -> "Figure":
    """Loss of the same text against how many tokens the model saw at once; each path is a pattern of evaluations."""
    lines: dict[str, Line] = {}
    for name, pattern in evaluations.items():
        read = [json.loads(path.read_text()) for path in pattern.parent.glob(pattern.name)]
        found = sorted((one["context"], one["loss"]) for one in read)
        lines[name] = [context for context, _ in found], [loss for _, loss in found]
    return _over_counts(lines, "context, tokens", "loss of the same tokens")


def _over_counts(lines: dict[str, Line], xlabel: str, ylabel: str) -> "Figure":
    """Lines over numbers of tokens, which double from one tick to the next."""
    with styled_figure(3.5, rows=1) as (figure, (axes,)):
        axes.set_xscale("log", base=2)
        _lines(axes, lines)
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.set_xlabel(xlabel)
        axes.set_ylabel(ylabel)
        return figure


def _run(folder: Path) -> tuple[list[float], list[float], list[float]]:
    """Steps, minutes of training and losses of a run's validations."""
    log = [json.loads(line) for line in (folder / "train_log.jsonl").read_text().splitlines()]
    config = json.loads((folder / "config.json").read_text())["options"]
    tokens = config["batch"] * config["accumulate"] * config["context"]
    steps, minutes, losses, seconds, last = list[float](), list[float](), list[float](), 0.0, 0
    for record in log:
        if "tokens_per_second" in record:
            seconds += (record["step"] - last) * tokens / record["tokens_per_second"]
            last = record["step"]
        if "eval_loss" in record:
            steps.append(record["step"])
            minutes.append(seconds / 60)
            losses.append(record["eval_loss"])
    return steps, minutes, losses


def _lines(axes: "Axes", lines: dict[str, Line]) -> None:
    ends = []
    for (name, (xs, ys)), (color, dashes, marker) in zip(lines.items(), _LOOKS, strict=False):
        axes.plot(xs, ys, color=light(color), linestyle=dashes, marker=marker, markersize=4, linewidth=1.8)
        ends.append(LineEnd(xs[-1], ys[-1], f"{name} {ys[-1]:.2f}", light(color)))
    axes.grid(axis="y")
    axes.set_axisbelow(True)
    axes.set_xlim(right=max(max(xs) for xs, _ in lines.values()))
    label_line_ends(axes, ends)


PLOTS = {"losses": losses_plot, "positions": positions_plot, "contexts": contexts_plot}


def main(arguments: Sequence[str] | None = None) -> int:
    """Draw and save; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("plot", choices=tuple(PLOTS))
    parser.add_argument("named", nargs="+", metavar="NAME=PATH")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args(arguments)
    named: dict[str, Any] = {name: Path(path) for name, _, path in (given.partition("=") for given in options.named)}
    if len(named) > len(_LOOKS):
        parser.error(f"{len(named)} lines are more than the {len(_LOOKS)} that can be told apart")
    figure = PLOTS[options.plot](named)
    figure.savefig(options.out, dpi=140, metadata={"Software": None})
    print(options.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
