"""The folder of a language model's training, and what of it is continued."""

import json
import shutil
from pathlib import Path
from typing import Any

from neural_layers.distill.checkpoint import (
    Checkpoint,
    newest_checkpoint,
    remove_leftovers,
    remove_newer,
    save_model,
)
from neural_layers.distill.files import replacing, save_json
from neural_layers.distill.recipes.language_model_options import LanguageModelOptions
from neural_layers.distill.run_folder import RunFolder
from neural_layers.errors import InputError

RECIPE = "language_model"


class LanguageModelRun(RunFolder):
    """`config.json`, `train_log.jsonl`, `tensorboard/`, `validation/`, `tokenizer/`, `checkpoints/`, `model/`
    (safetensors, config, tokenizer), `report.json`.

    A folder that is new or empty begins a run; one of a run with the same options continues it.
    Raises: InputError where the folder holds anything else, or a run with other options (naming the first), and where
    `options.resume` is set and there is nothing to continue.
    """

    def __init__(self, options: LanguageModelOptions) -> None:
        path = self.path = options.out
        if path.exists() and not path.is_dir():
            raise InputError(f"{path} is a file; --out takes a folder")
        self.config = self._read_config()
        self.checkpoint: Checkpoint | None = None
        if self.config is None:
            if options.resume:
                raise InputError(f"{path} holds no run to resume; leave --resume out, or check --out")
            # A run that was killed before it wrote its config has at most its tokenizer, and parts of files.
            others = [p.name for p in path.glob("*") if p.name != "tokenizer" and not p.name.endswith(".part")]
            if others:
                raise InputError(
                    f"{path} is not empty ({others[0]}) and nothing in it is overwritten; give another --out or "
                    "remove it"
                )
            return
        if self.config.get("recipe") != RECIPE:
            raise InputError(f"{path} is the folder of another kind of run; give another --out")
        differing = options.differing(self.config["options"])
        if differing is not None:
            name, before, now = differing
            raise InputError(
                f"{name} was {before} when the run in {path} began and is {now} now; give the same to continue it, or "
                "another --out"
            )
        self.checkpoint = newest_checkpoint(self.checkpoints)

    @property
    def checkpoints(self) -> Path:
        """Where the checkpoints are."""
        return self.path / "checkpoints"

    @property
    def model(self) -> Path:
        """Where the result is."""
        return self.path / "model"

    @property
    def tokenizer(self) -> Path:
        """Where the tokenizer is from the beginning, so that it is made once."""
        return self.path / "tokenizer"

    @property
    def is_finished(self) -> bool:
        """Whether the result is written."""
        return (self.model / "config.json").is_file() and (self.path / "report.json").is_file()

    def report(self) -> dict[str, Any]:
        """The report of a finished run."""
        return dict(json.loads((self.path / "report.json").read_text(encoding="utf-8")))

    def prepare(self) -> None:
        """Make the folder; remove what a killed process left half, and from the log what comes after the checkpoint."""
        self.path.mkdir(parents=True, exist_ok=True)
        for folder in (self.path, self.checkpoints):
            remove_leftovers(folder)
        remove_newer(self.checkpoints, self._step)
        if self.model.exists():
            shutil.rmtree(self.model)  # written, but not yet reported: it is written again
        log = self.path / "train_log.jsonl"
        if log.is_file():
            kept = [line for line in log.read_text(encoding="utf-8").splitlines() if _step(line) <= self._step]
            with replacing(log) as beside:
                beside.write_text("".join(line + "\n" for line in kept), encoding="utf-8")

    def save_tokenizer(self, tokenizer: Any) -> None:
        """Write the tokenizer to where a continued run finds it."""
        with replacing(self.tokenizer) as beside:
            tokenizer.save_pretrained(beside)

    def save_result(self, model: Any, weights: Any) -> None:
        """Write the trained model with the run's tokenizer; `weights` as in `save_model`."""
        with replacing(self.model) as beside:
            save_model(beside, model, weights)
            shutil.copytree(self.tokenizer, beside, dirs_exist_ok=True)

    def begin(self, config: dict[str, Any]) -> None:
        """Write `config.json`, or compare the data with what it says. Raises InputError where they differ."""
        if self.config is None:
            save_json(self.path / "config.json", {"recipe": RECIPE, **config})
        elif self.config["data"] != config["data"]:
            raise InputError(
                f"the data has changed since the run in {self.path} began; continue with the same data, or give "
                "another --out"
            )

    @property
    def _step(self) -> int:
        return 0 if self.checkpoint is None else self.checkpoint.step

    def _read_config(self) -> dict[str, Any] | None:
        file = self.path / "config.json"
        if not file.is_file():
            return None
        try:
            config = json.loads(file.read_text(encoding="utf-8"))
            if isinstance(config, dict):
                return config
        except (OSError, ValueError):
            pass
        raise InputError(f"{file} is no run's config; give another --out")


def _step(line: str) -> float:
    """The step of a line of the log; infinity for one that was cut off."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return float("inf")
