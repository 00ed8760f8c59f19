"""The folder of a run."""

import json
from pathlib import Path
from typing import Any

from neural_layers.distill.files import replacing
from neural_layers.errors import InputError


class RunFolder:
    """`config.json`, `train_log.jsonl`, `validation/`, `checkpoints/`, `student/`, `report.html`, `report.json`.

    path: a folder that does not exist yet or is empty; raises InputError otherwise.
    """

    def __init__(self, path: Path) -> None:
        if path.exists() and not path.is_dir():
            raise InputError(f"{path} is a file; --out takes a folder")
        if path.is_dir() and any(path.iterdir()):
            raise InputError(f"{path} is not empty and nothing in it is overwritten; give another --out or remove it")
        path.mkdir(parents=True, exist_ok=True)
        self.path = path

    def save_model(self, name: str, model: Any, tokenizer: Any) -> Path:
        """Write weights (safetensors), config and tokenizer to the folder `name`; return it."""
        target = self.path / name
        with replacing(target) as beside:
            model.save_pretrained(beside)
            tokenizer.save_pretrained(beside)
        return target

    def append_log(self, record: dict[str, Any]) -> None:
        """Add a line to `train_log.jsonl`. Raises ValueError for NaN and infinity."""
        with (self.path / "train_log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")
