"""Small runs of `neural-layers train` for tests."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

from neural_layers.distill.recipes.language_model_options import LanguageModelOptions

ROOT = Path(__file__).resolve().parents[2]
WORDS = ["the", "old", "man", "and", "the", "sea", "told", "the", "young", "king", "of", "the", "storm", "that", "came"]


def write_corpus(folder: Path) -> Path:
    """A folder with train.txt and valid.txt of simple sentences."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, count, factor in (("train", 900, 7), ("valid", 120, 5)):
        words = [WORDS[(i * i + factor * i) % len(WORDS)] for i in range(count)]
        (folder / f"{name}.txt").write_text(" ".join(words) + "\n")
    return folder


def small_options(folder: Path, out: str = "run", **changes: Any) -> LanguageModelOptions:
    """Options of a run that takes a second; the corpus is in `folder`/data."""
    options: dict[str, Any] = {
        "data": (str(folder / "data"),),
        "out": folder / out,
        "cache": folder / "cache",
        "layers": 2,
        "mixers": "mamba,attention",
        "width": 16,
        "heads": 2,
        "kv_heads": 1,
        "ff": 24,
        "context": 16,
        "batch": 4,
        "steps": 8,
        "eval_steps": 4,
        "save_steps": 2,
        "lr": 1e-2,
    }
    return LanguageModelOptions(**{**options, **changes})


def arguments(options: LanguageModelOptions) -> list[str]:
    """The command line of options, as far as it differs from the default."""
    given: list[str] = []
    for name, value in options.record().items():
        if value == LanguageModelOptions.__dataclass_fields__[name].default:
            continue
        flag = "--" + name.replace("_", "-")
        for entry in value if name == "data" else [value]:
            given += [flag] if entry is True else [flag, str(entry)]
    return given


def start(command: list[str], **variables: str) -> subprocess.Popen[str]:
    """Start Python with `command`, on one thread and without a network."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), **variables}
    return subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )


def log_of(run: Path) -> list[dict[str, Any]]:
    """The lines of a run's log."""
    return [json.loads(line) for line in (run / "train_log.jsonl").read_text().splitlines()]


def weights_of(run: Path) -> bytes:
    """The bytes of a run's final weights."""
    return (run / "model" / "model.safetensors").read_bytes()
