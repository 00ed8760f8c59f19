"""The folder of a run, and files that appear whole or not at all."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

from torch import Tensor

from neural_layers.errors import InputError


def save_text(path: Path, text: str) -> None:
    """Write beside and rename, so that an interruption leaves the old file or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = _beside(path)
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, path)


def _beside(path: Path) -> Path:
    """A name in the same folder that no other process uses."""
    return path.with_name(f"{path.name}.{os.getpid()}.part")


def save_json(path: Path, content: Any) -> None:
    """`save_text` of indented JSON. Raises ValueError for NaN and infinity, which JSON has not."""
    save_text(path, json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def save_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Write a safetensors file beside and rename."""
    from safetensors.torch import save_file

    beside = _beside(path)
    save_file(tensors, beside)
    os.replace(beside, path)


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
        beside = _beside(target)
        shutil.rmtree(beside, ignore_errors=True)
        model.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
        os.replace(beside, target)
        return target

    def append_log(self, record: dict[str, Any]) -> None:
        """Add a line to `train_log.jsonl`. Raises ValueError for NaN and infinity."""
        with (self.path / "train_log.jsonl").open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")
