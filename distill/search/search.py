"""A search: one run of a recipe after the other, each with the options that the sampler proposes."""

import contextlib
import math
import shlex
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from tqdm.auto import tqdm

from neural_layers.distill.search.objectives import parse_objectives
from neural_layers.distill.search.pruning import PruningCallback
from neural_layers.distill.search.recipe import SearchedRecipe
from neural_layers.distill.search.space import parse_parameters
from neural_layers.distill.search.study import PRUNERS, SearchFolder, Setting, state_of
from neural_layers.errors import InputError

if TYPE_CHECKING:
    import optuna

HOPELESS = 8  # so many trials that fail at the beginning, all for one reason, are enough


class SearchFailed(Exception):
    """No trial came to its end; the message is one line that tells why."""


@dataclass(frozen=True)
class SearchOptions:
    """What a person can choose of a search.

    out:         its folder: new, empty, or of the same search, which is then continued
    trials:      how many in all, those of earlier calls and of other processes included
    parameters:  what is searched, as `parse_parameter` reads it
    objectives:  what is made best, as `parse_objectives` reads it; none for the recipe's own
    arguments:   the recipe's own options, which all trials share, as on its command line
    seed:        of the sampler
    prune:       "median", "hyperband" or "none"; prune_after: trials that the median waits for
    """

    out: Path
    trials: int
    parameters: tuple[str, ...]
    objectives: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()
    seed: int = 0
    prune: str = "median"
    prune_after: int = 5

    def check(self) -> None:
        """Raise InputError for a value that cannot be."""
        for name in ("trials", "prune_after"):
            if getattr(self, name) < 1:
                raise InputError(f"--{name.replace('_', '-')} {getattr(self, name)} must be at least 1")
        if not 0 <= self.seed < 2**32:
            raise InputError(f"--seed {self.seed} is out of range; give one from 0 to {2**32 - 1}")
        if self.prune not in PRUNERS:
            raise InputError(f"--prune {self.prune} must be one of {', '.join(PRUNERS)}")


class Search:
    """A search in its folder. Several processes may run the same one at the same time: each takes the next trial.

    Raises InputError for options that cannot be, or are of another search than the folder's.
    """

    def __init__(self, options: SearchOptions, recipe: SearchedRecipe) -> None:
        options.check()
        self.options, self.recipe = options, recipe
        self.parameters = parse_parameters(options.parameters, recipe.options)
        self.objectives = parse_objectives(options.objectives, recipe)
        given = {argument.partition("=")[0] for argument in options.arguments}
        for parameter in self.parameters:
            option = parameter.option
            for flag in given & {option.flag, *option.aliases}:
                raise InputError(f"{flag} is searched and given behind --; leave one of them out")
        # What is wrong with the options that all trials share is told at once.
        recipe.parse([*options.arguments, "--out", str(options.out / "trials" / "0")])
        prune = options.prune if self._pruning_obstacle() is None else "none"
        self.folder = SearchFolder(
            options.out,
            Setting(
                recipe.name,
                options.arguments,
                self.parameters,
                self.objectives,
                options.seed,
                prune,
                options.prune_after,
            ),
        )
        self.study = self.folder.study
        self.prunes = prune != "none"

    def _pruning_obstacle(self) -> str | None:
        """Why no trial can be pruned, where that is so."""
        if len(self.objectives) > 1:
            return "there are several objectives"
        if self.objectives[0].name not in self.recipe.scores:
            return f"{self.objectives[0].name} is known only at a trial's end"
        return None

    def run(self, show_bar: bool = True) -> None:
        """Carry trials out until there are as many as were asked for.

        Raises SearchFailed where the first trials all failed for one reason; whatever ends a recipe otherwise (a full
        disk, an interruption) ends the search, and the same call continues that trial.
        """
        obstacle = self._pruning_obstacle()
        if obstacle is not None and self.options.prune != "none" and show_bar:
            tqdm.write(f"no trial is pruned: {obstacle}")
        # The bar stays on the terminal; what a recipe prints goes to the log of its trial.
        with tqdm(total=self.options.trials, desc="search", unit="trial", disable=not show_bar, file=sys.stderr) as bar:
            self._count(bar)
            while (claimed := self.folder.claim(self.options.trials)) is not None:
                trial, lock = claimed
                try:
                    line = self._carry_out(trial)
                finally:
                    lock.release()
                bar.write(line, file=sys.stdout)
                self._count(bar)
                self._stop_where_hopeless()

    def _count(self, bar: Any) -> None:
        bar.n = sum(trial.state.is_finished() for trial in self.study.get_trials(deepcopy=False))
        bar.refresh()

    def arguments(self, values: dict[str, Any]) -> list[str]:
        """The recipe's arguments with these values of the parameters, without --out."""
        chosen = [a for p in self.parameters if p.name in values for a in p.arguments(values[p.name])]
        return [*self.options.arguments, *chosen]

    def command(self, values: dict[str, Any], out: Path) -> str:
        """The recipe's own command line with these values."""
        return shlex.join(["neural-layers", *self.recipe.words, *self.arguments(values), "--out", str(out)])

    def _carry_out(self, trial: "optuna.Trial") -> str:
        """Run the recipe; tell the study what came of it; return a line on that."""
        import optuna

        said = f"trial {trial.number}: " + ", ".join(f"{k}={_short(v)}" for k, v in trial.params.items())
        callbacks = [PruningCallback(trial, self.objectives[0].name)] if self.prunes else []
        out = self.folder.trial_folder(trial.number)
        try:
            with _logged(out.with_name(f"{out.name}.log")):
                options = self.recipe.parse([*self.arguments(trial.params), "--out", str(out)])
                report = self.recipe.run(options, self.command(trial.params, out), callbacks)
            metrics = self.recipe.measure(report)
            values = [self._value(metrics, objective.name) for objective in self.objectives]
        except optuna.TrialPruned as pruned:
            self.study.tell(trial, state=optuna.trial.TrialState.PRUNED)
            return f"{said}: {pruned}"
        except (InputError, FloatingPointError, MemoryError, torch.OutOfMemoryError) as error:
            return f"{said}: failed: {self._fail(trial, error)}"
        except OSError:
            raise  # a full disk is not the trial's fault: it is continued by the next call
        except Exception as error:
            self._fail(trial, error)  # so that the next call does not come to the same again
            raise
        trial.set_user_attr("metrics", metrics)
        self.study.tell(trial, values)
        found = ", ".join(f"{o.name} {v:.6g}" for o, v in zip(self.objectives, values, strict=True))
        return f"{said}: {found}"

    def _fail(self, trial: "optuna.Trial", error: BaseException) -> str:
        import optuna

        reason = " ".join(str(error).split()) or type(error).__name__
        trial.set_user_attr("reason", reason)
        # The sampler does not look at what Optuna calls failed, and would propose it again and again.
        self.study.tell(trial, state=optuna.trial.TrialState.PRUNED)
        return reason

    def _value(self, metrics: dict[str, float], name: str) -> float:
        value = metrics.get(name)
        if value is None:
            raise InputError(f"the run has no {name}; does it validate? There are {', '.join(metrics)}")
        if not math.isfinite(value):
            raise InputError(f"{name} is {value}")
        return value

    def _stop_where_hopeless(self) -> None:
        finished = [t for t in self.study.get_trials(deepcopy=False) if t.state.is_finished()]
        reasons = {t.user_attrs.get("reason") for t in finished}
        if all(state_of(t) == "failed" for t in finished) and len(finished) >= HOPELESS and len(reasons) == 1:
            raise SearchFailed(f"the first {len(finished)} trials failed, all for one reason: {reasons.pop()}")


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


@contextlib.contextmanager
def _logged(path: Path) -> Iterator[None]:
    """Let everything that is printed in a block go to the end of a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with (
        path.open("a", encoding="utf-8") as file,
        contextlib.redirect_stdout(file),
        contextlib.redirect_stderr(file),
    ):
        yield
