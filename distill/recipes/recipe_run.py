"""The folder of a run that can be continued: what is done stays, and what a killed process left half goes."""

import json
import shutil
from pathlib import Path
from typing import Any

from neural_layers.distill.checkpoint import newest_checkpoint, remove_leftovers
from neural_layers.distill.files import replacing, save_json
from neural_layers.distill.gate_state import decided
from neural_layers.distill.recipes.recipe_options import RecipeOptions
from neural_layers.distill.run_folder import RunFolder
from neural_layers.errors import InputError


class RecipeRun(RunFolder):
    """`config.json`, `train_log.jsonl`, `validation/`, `checkpoints/NAME/`, `tokenizer/`, a folder for each trained
    model, `report.html`, `report.json`.

    recipe:  its name, as config.json keeps it
    options: with `out`, the folder, and `resume`. A folder that is new or empty begins a run; one of a run with the
             same options continues it.
    Raises InputError where the folder holds anything else, or a run with other options (naming the first), and where
    `options.resume` is set and there is nothing to continue.
    """

    def __init__(self, recipe: str, options: RecipeOptions) -> None:
        given: Any = options
        path = self.path = Path(given.out)
        self.recipe = recipe
        if path.exists() and not path.is_dir():
            raise InputError(f"{path} is a file; --out takes a folder")
        self.config = self._read_config()
        if self.config is None:
            if given.resume:
                raise InputError(f"{path} holds no run to resume; leave --resume out, or check --out")
            # A run that was killed before it wrote its config has at most its tokenizer, and parts of files.
            others = [p.name for p in path.glob("*") if p.name != "tokenizer" and not p.name.endswith(".part")]
            if others:
                raise InputError(
                    f"{path} is not empty ({others[0]}) and nothing in it is overwritten; give another --out or "
                    "remove it"
                )
            return
        if self.config.get("recipe") != recipe:
            raise InputError(f"{path} is the folder of another kind of run; give another --out")
        differing = options.differing(self.config["options"])
        if differing is not None:
            name, before, now = differing
            raise InputError(
                f"{name} was {before} when the run in {path} began and is {now} now; give the same to continue it, or "
                "another --out"
            )

    @property
    def is_finished(self) -> bool:
        """Whether the report is written."""
        return (self.path / "report.json").is_file()

    def report(self) -> dict[str, Any]:
        """The report of a finished run."""
        return dict(json.loads((self.path / "report.json").read_text(encoding="utf-8")))

    def begin(self, config: dict[str, Any]) -> None:
        """Write `config.json`, or compare the data with what it says. Raises InputError where they differ."""
        self.path.mkdir(parents=True, exist_ok=True)
        validation = self.path / "validation"
        for folder in (self.path, validation, *validation.glob("*/")):
            remove_leftovers(folder)
        if self.config is None:
            save_json(self.path / "config.json", {"recipe": self.recipe, **config})
        elif self.config["data"] != config["data"]:
            raise InputError(
                f"the data has changed since the run in {self.path} began; continue with the same data, or give "
                "another --out"
            )

    @property
    def tokenizer(self) -> Path:
        """Where the tokenizer is from the beginning, so that it is made once."""
        return self.path / "tokenizer"

    def save_tokenizer(self, tokenizer: Any) -> None:
        """Write the tokenizer to where a continued run finds it."""
        self.path.mkdir(parents=True, exist_ok=True)
        with replacing(self.tokenizer) as beside:
            tokenizer.save_pretrained(beside)

    def is_trained(self, name: str) -> bool:
        """Whether the training of that model is over and its weights are saved."""
        return (self.path / name / "config.json").is_file()

    def save_model(self, name: str, model: Any, tokenizer: Any) -> Path:
        target = self.path / name
        if target.exists():
            shutil.rmtree(target)
        return super().save_model(name, model, tokenizer)

    def checkpoints(self, name: str) -> Path:
        """Where the checkpoints of a model are."""
        return self.path / "checkpoints" / name

    def log_of(self, name: str) -> list[dict[str, Any]]:
        """The records of that model's training in `train_log.jsonl` that hold a loss."""
        return [record for record in self._log() if record["model"] == name and "loss" in record]

    def trim_log(self, name: str) -> None:
        """Remove from the log what that model's newest checkpoint does not know of; what a rollback gave up stays."""
        found, (rollbacks, stopped_at) = newest_checkpoint(self.checkpoints(name)), decided(self.checkpoints(name))
        is_of_branch = found is not None and found.state.get("rollbacks", 0) == rollbacks
        step = stopped_at or (found.step if found is not None and is_of_branch else 0)

        def stays(record: dict[str, Any]) -> bool:
            return record["model"] != name or record.get("rollbacks", 0) < rollbacks or record["step"] <= step

        with replacing(self.path / "train_log.jsonl") as beside:
            beside.write_text("".join(json.dumps(r) + "\n" for r in self._log() if stays(r)), encoding="utf-8")

    def _log(self) -> list[dict[str, Any]]:
        file = self.path / "train_log.jsonl"
        records = []
        for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else []:
            try:
                records.append(json.loads(line))
            except ValueError:  # cut off by a kill
                continue
        return records

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
