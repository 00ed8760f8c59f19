"""The folder of a search and the study in it: what was tried, kept so that any process can go on with it."""

import json
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from neural_layers.distill.files import save_json
from neural_layers.distill.search.locks import FileLock
from neural_layers.distill.search.objectives import Objective
from neural_layers.distill.search.space import Parameter
from neural_layers.errors import InputError

if TYPE_CHECKING:
    import optuna

PRUNERS = ("median", "hyperband", "none")
_NAME = "search"


@dataclass(frozen=True)
class Setting:
    """What makes two searches the same one: with any of it changed, earlier trials would not be comparable."""

    recipe: str
    arguments: tuple[str, ...]
    parameters: tuple[Parameter, ...]
    objectives: tuple[Objective, ...]
    seed: int
    prune: str
    prune_after: int

    def record(self) -> dict[str, Any]:
        """For `search.json`."""
        return {
            "recipe": self.recipe,
            "arguments": list(self.arguments),
            "parameters": {parameter.name: parameter.spec for parameter in self.parameters},
            "objectives": [str(objective) for objective in self.objectives],
            "seed": self.seed,
            "prune": self.prune,
            "prune_after": self.prune_after,
        }

    def check_same(self, before: dict[str, Any], path: Path) -> None:
        """Raise InputError, naming it, for the first thing that is not as in `before`, the record of a search."""
        now = self.record()
        searched = before.get("parameters", {})
        for name in dict.fromkeys([*searched, *now["parameters"]]):
            old, new = searched.get(name, "not searched"), now["parameters"].get(name, "not searched")
            if old != new:
                raise InputError(
                    f"--parameter {name} was {old} when the search in {path} began and is {new} now; give the same to "
                    "continue it, or another --out"
                )
        for name, value in now.items():
            if name != "parameters" and before.get(name) != value:
                old, new = (" ".join(v) if isinstance(v, list) else v for v in (before.get(name), value))
                raise InputError(
                    f"the {name.replace('_', ' ')} of the search in {path} were {old} and are {new} now; give the same "
                    "to continue it, or another --out"
                )


class SearchFolder:
    """`search.json` (what is searched), `study.db` (SQLite), `trials/N/` (the run of each trial) with `trials/N.log`,
    `locks/`, and the results.

    A folder that is new or empty begins a search; one of a search with the same setting continues it.
    Raises InputError where the folder holds anything else.
    """

    def __init__(self, path: Path, setting: Setting) -> None:
        self.path, self.setting = path, setting
        if path.exists() and not path.is_dir():
            raise InputError(f"{path} is a file; --out takes a folder")
        others = [p.name for p in path.glob("*") if p.name != "locks" and not p.name.endswith(".part")]
        if others and not (path / "search.json").is_file():
            raise InputError(f"{path} is not empty ({others[0]}) and holds no search; give another --out or remove it")
        self.lock = FileLock(path / "locks" / "study")
        with self.lock.held():
            if (path / "search.json").is_file():
                setting.check_same(_read(path / "search.json"), path)
            else:
                save_json(path / "search.json", setting.record())
            self.study = _study(path, setting)

    def trial_folder(self, number: int) -> Path:
        """The run's folder of a trial."""
        return self.path / "trials" / str(number)

    def trial_lock(self, number: int) -> FileLock:
        """Held by the process that carries the trial out."""
        return FileLock(self.path / "locks" / f"trial-{number}")

    def claim(self, trials: int) -> "tuple[optuna.Trial, FileLock] | None":
        """A trial for this process, and its lock: one whose process has died, else a new one while there are fewer than
        `trials`; None where there is nothing left to begin."""
        import optuna

        with self.lock.held():
            for found in self.study.get_trials(deepcopy=False, states=(optuna.trial.TrialState.RUNNING,)):
                lock = self.trial_lock(found.number)
                if not lock.acquire(wait=False):
                    continue
                # Its process may have finished it, and let go, since the list was made.
                if self.study.get_trials(deepcopy=False)[found.number].state.is_finished():
                    lock.release()
                else:
                    return self._with_values(optuna.Trial(self.study, found._trial_id)), lock
            if len(self.study.get_trials(deepcopy=False)) >= trials:
                return None
            trial = self.study.ask()
            lock = self.trial_lock(trial.number)
            lock.acquire(wait=True)
            return self._with_values(trial), lock

    def _with_values(self, trial: "optuna.Trial") -> "optuna.Trial":
        for parameter in self.setting.parameters:
            parameter.suggest(trial)
        return trial


def state_of(trial: "optuna.trial.FrozenTrial") -> str:
    """ "completed", "pruned", "failed" (which has a reason) or "running"."""
    if not trial.state.is_finished():
        return "running"
    if trial.state.name == "FAIL" or "reason" in trial.user_attrs:
        return "failed"
    return "completed" if trial.state.name == "COMPLETE" else "pruned"


def _study(path: Path, setting: Setting) -> "optuna.Study":
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    storage = optuna.storages.RDBStorage(
        f"sqlite:///{path / 'study.db'}",
        engine_kwargs={"connect_args": {"timeout": 120}},  # seconds to wait for another process
    )
    pruner: optuna.pruners.BasePruner = optuna.pruners.NopPruner()
    if setting.prune == "median":
        pruner = optuna.pruners.MedianPruner(n_startup_trials=setting.prune_after)
    elif setting.prune == "hyperband":
        pruner = optuna.pruners.HyperbandPruner()
    return optuna.create_study(
        storage=storage,
        study_name=_NAME,
        load_if_exists=True,
        directions=[objective.study_direction for objective in setting.objectives],
        sampler=_numbered_sampler(setting.seed),
        pruner=pruner,
    )


def _numbered_sampler(seed: int) -> Any:
    """A TPE sampler (arXiv 2304.11127) whose random numbers depend on the seed and the number of the trial alone: a
    search that goes on after a kill tries what it would have tried, and processes side by side try different things."""
    import optuna

    class NumberedSampler(optuna.samplers.BaseSampler):
        def __init__(self) -> None:
            self._of: dict[int, Any] = {}

        def _sampler(self, trial: Any) -> Any:
            if trial.number not in self._of:
                own = zlib.crc32(f"{seed}/{trial.number}".encode())
                self._of = {trial.number: optuna.samplers.TPESampler(seed=own)}
            return self._of[trial.number]

        def infer_relative_search_space(self, study: Any, trial: Any) -> Any:
            return self._sampler(trial).infer_relative_search_space(study, trial)

        def sample_relative(self, study: Any, trial: Any, search_space: Any) -> Any:
            return self._sampler(trial).sample_relative(study, trial, search_space)

        def sample_independent(self, study: Any, trial: Any, param_name: str, param_distribution: Any) -> Any:
            return self._sampler(trial).sample_independent(study, trial, param_name, param_distribution)

        def before_trial(self, study: Any, trial: Any) -> None:
            self._sampler(trial).before_trial(study, trial)

        def after_trial(self, study: Any, trial: Any, state: Any, values: Any) -> None:
            self._sampler(trial).after_trial(study, trial, state, values)

    return NumberedSampler()


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(found, dict):
            return found
    except (OSError, ValueError):
        pass
    raise InputError(f"{file} is no search's record; give another --out")
