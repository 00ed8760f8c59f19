"""The folder of a language model's training, and what of it is continued."""

import json
import shutil
from pathlib import Path
from typing import Any, ClassVar

from neural_layers.distill.checkpoint import (
    Checkpoint,
    newest_checkpoint,
    remove_leftovers,
    remove_newer,
    save_model,
)
from neural_layers.distill.files import replacing
from neural_layers.distill.recipes.language_model_options import LanguageModelOptions
from neural_layers.distill.recipes.recipe_run import RecipeRun

RECIPE = "language_model"


class LanguageModelRun(RecipeRun):
    """`config.json`, `train_log.jsonl`, `tensorboard/`, `validation/`, `tokenizer/`, `checkpoints/`, `model/`
    (safetensors, config, tokenizer), `report.json`. Continued, and raises, as `RecipeRun`.
    """

    name: ClassVar[str] = RECIPE

    def __init__(self, options: LanguageModelOptions) -> None:
        super().__init__(self.name, options)
        self.checkpoint: Checkpoint | None = newest_checkpoint(self.checkpoint_folder)

    @property
    def checkpoint_folder(self) -> Path:
        """Where the checkpoints are."""
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        """Where the result is."""
        return self.path / "model"

    @property
    def is_finished(self) -> bool:
        """Whether the result is written."""
        return (self.model / "config.json").is_file() and (self.path / "report.json").is_file()

    def prepare(self) -> None:
        """Make the folder; remove what a killed process left half, and from the log what comes after the checkpoint."""
        self.path.mkdir(parents=True, exist_ok=True)
        for folder in (self.path, self.checkpoint_folder):
            remove_leftovers(folder)
        remove_newer(self.checkpoint_folder, self._step)
        if self.model.exists():
            shutil.rmtree(self.model)  # written, but not yet reported: it is written again
        log = self.path / "train_log.jsonl"
        if log.is_file():
            kept = [line for line in log.read_text(encoding="utf-8").splitlines() if _step(line) <= self._step]
            with replacing(log) as beside:
                beside.write_text("".join(line + "\n" for line in kept), encoding="utf-8")

    def save_result(self, model: Any, weights: Any) -> None:
        """Write the trained model with the run's tokenizer; `weights` as in `save_model`."""
        with replacing(self.model) as beside:
            save_model(beside, model, weights)
            shutil.copytree(self.tokenizer, beside, dirs_exist_ok=True)

    @property
    def _step(self) -> int:
        return 0 if self.checkpoint is None else self.checkpoint.step


def _step(line: str) -> float:
    """The step of a line of the log; infinity for one that was cut off."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
