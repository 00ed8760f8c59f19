"""TensorBoard, Weights & Biases and MLflow, through the callbacks that transformers has for them."""

import importlib
import os
import sys
from pathlib import Path
from typing import Any

from neural_layers.errors import InputError

# The package that each one needs, and how it is installed. The last two are large, and so in no extra of ours.
TRACKERS = {
    "tensorboard": ("tensorboard", "pip install 'neural-layers[train]'"),
    "wandb": ("wandb", "pip install wandb"),
    "mlflow": ("mlflow", "pip install mlflow"),
}
# What this module has put into the environment: what a person has put there stays.
_own: dict[str, str] = {}


def tracker_names(text: str) -> tuple[str, ...]:
    """The trackers that `--report-to` names, with commas between; none for "none".

    Raises InputError for a name that there is not, ImportError where a tracker's package is missing.
    """
    names = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    if names == ("none",):
        return ()
    for name in names:
        if name not in TRACKERS:
            raise InputError(
                f"--report-to {text}: there is no tracker {name!r}; give none, or one or several of "
                f"{', '.join(TRACKERS)} with commas between"
            )
    for name in names:
        package, remedy = TRACKERS[name]
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise ImportError(f"--report-to {name} needs {package}, which is missing; {remedy}") from error
    return names


def tracking_arguments(names: tuple[str, ...], folder: Path, run_name: str) -> dict[str, Any]:
    """What `TrainingArguments` takes so that a training reports to these trackers; to be called right before each
    Trainer is made, for the trackers find their folders in the environment.

    names:    as `tracker_names` returns them
    folder:   the run's: TensorBoard writes to tensorboard/`run_name` in it, W&B to wandb/, MLflow to mlruns/ (its
              figures in mlflow.db there)
    run_name: what the trackers call this training

    A tracking server of MLflow (MLFLOW_TRACKING_URI) and all settings of W&B that are in the environment are kept;
    without a WANDB_MODE its runs stay on this machine, to be sent by `wandb sync`. A run that an earlier training of
    this process has left open is ended.
    """
    if "tensorboard" in names:
        os.environ["TENSORBOARD_LOGGING_DIR"] = str(folder / "tensorboard" / run_name)
    if "wandb" in names:
        folder.mkdir(parents=True, exist_ok=True)  # W&B writes elsewhere where it is missing
        _set("WANDB_MODE", "offline")
        _set("WANDB_DIR", str(folder.resolve()))
        _set("WANDB_PROJECT", "neural-layers")
        wandb: Any = sys.modules["wandb"]
        if wandb.run is not None:
            wandb.finish()
    if "mlflow" in names:
        store = folder.resolve() / "mlruns"
        store.mkdir(parents=True, exist_ok=True)
        _set("MLFLOW_TRACKING_URI", f"sqlite:///{store / 'mlflow.db'}")
        mlflow: Any = sys.modules["mlflow"]
        # The process may have another one from an earlier training.
        mlflow.set_tracking_uri(os.environ["MLFLOW_TRACKING_URI"])
        if mlflow.active_run() is not None:
            mlflow.end_run()
    return {"report_to": list(names) or "none", "run_name": run_name}


def _set(name: str, value: str) -> None:
    """Set a variable that a person has not set."""
    if os.environ.get(name) in (None, _own.get(name)):
        os.environ[name] = _own[name] = value
