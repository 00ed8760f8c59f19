"""One model's training within a recipe: what it leaves beside the model, also for a run that is continued."""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from neural_layers.distill.files import save_json
from neural_layers.distill.gate import QualityGate
from neural_layers.distill.progress import ProgressBar
from neural_layers.distill.recipes.recipe_run import RecipeRun
from neural_layers.distill.trainer import DistillationTrainer
from neural_layers.errors import InputError

PRECISIONS = ("auto", "float32", "bf16", "fp16")


@dataclass(frozen=True)
class Trained:
    """What a training leaves beside the model: its length, its validations and log, and what the gate did."""

    steps: int
    seconds: float
    best_step: int | None
    outcome: str
    validations: list[dict[str, float]]
    rollbacks: list[dict[str, Any]]
    log: list[dict[str, Any]]


def train_to_the_end(name: str, trainer: DistillationTrainer, run: RecipeRun) -> Trained:
    """Train, or go on from the last checkpoint; the model then has the weights of its best validation."""
    run.trim_log(name)
    for callback in trainer.callback_handler.callbacks:
        if isinstance(callback, ProgressBar):
            callback.trainer = trainer
    trainer.run()
    validate: Any = trainer.validate
    trained = Trained(
        steps=trainer.steps,
        seconds=round(trainer.seconds, 1),
        best_step=trainer.best_step(),
        outcome=trainer.outcome,
        validations=validate.history,
        rollbacks=[rollback.as_dict() for rollback in trainer.rollbacks],
        log=run.log_of(name),
    )
    save_json(run.checkpoints(name) / "trained.json", asdict(trained))
    return trained


def trained_before(name: str, run: RecipeRun) -> Trained:
    """What `train_to_the_end` returned when that model was trained, in a run that is continued."""
    return Trained(**json.loads((run.checkpoints(name) / "trained.json").read_text(encoding="utf-8")))


def refuse_processes() -> None:
    """Raise InputError under torchrun with several processes, each of which would write the run's folder."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world > 1:
        raise InputError(
            f"this recipe runs in one process and torchrun started {world}; start it without torchrun, or use "
            "DistillationTrainer in a program of your own, which several processes can share"
        )


def device() -> torch.device:
    """Where a recipe's models are, also those that it does not train in this process."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def mixed_precision(chosen: str) -> dict[str, Any]:
    """`bf16` and `fp16` of the arguments: what is asked for, else what the device is made for; a CPU takes float32.

    Raises InputError where the device cannot.
    """
    has_cuda = torch.cuda.is_available()
    if chosen == "auto":
        chosen = "float32"
        if has_cuda:
            chosen = "bf16" if torch.cuda.is_bf16_supported() else "fp16"
    if chosen == "fp16" and not has_cuda:
        raise InputError("--precision fp16 needs a GPU; give bf16, or float32")
    return {"bf16": chosen == "bf16", "fp16": chosen == "fp16"}


def judged(gate: QualityGate, retention: Mapping[str, float | None], student: Trained) -> dict[str, Any]:
    """The part `gate` of a report: passed where the student keeps `min_retention` of every retained metric."""
    failed = [metric for metric, kept in retention.items() if kept is None or kept < gate.min_retention]
    return {
        **gate.as_dict(),
        "outcome": student.outcome,
        "best_step": student.best_step,
        "retention": retention[gate.metric],
        "passed": not failed,
        "failed": failed,
    }
