"""Small runs of `neural-layers distill ntmm` for tests."""

import json
import random
from pathlib import Path
from typing import Any

import pytest

from neural_layers.cli import main
from neural_layers.distill.files import save_json

CUES = {"pain": ("ache", "sore", "hurts"), "skin": ("rash", "itch", "hives"), "lung": ("cough", "wheeze", "breath")}
FILLING = ("the", "patient", "child", "with", "some", "and", "today", "very", "old", "man", "woman", "no", "5", "mg")
# A run of a second: tiny models.
_SMALL = """--batch 16 --accumulate 2 --max-length 24 --tokenizer bpe:280 --teacher-width 32 --student-width 8
--teacher-heads 2 --student-heads 2 --dropout 0 --threads 1"""
SMALL = _SMALL.split()


def write_texts(folder: Path, sizes: tuple[int, int, int] = (64, 24, 24), seed: int = 0) -> Path:
    """train, valid and test files of texts whose class a word gives away; `lung` is the rarest."""
    chance = random.Random(seed)
    folder.mkdir(parents=True, exist_ok=True)
    for split, size in zip(("train", "valid", "test"), sizes, strict=True):
        lines = []
        for i in range(size):
            label = ("pain", "pain", "skin", "skin", "lung")[i % 5]
            words = [chance.choice(FILLING) for _ in range(6)]
            words.insert(chance.randrange(6), chance.choice(CUES[label]))
            lines.append(json.dumps({"text": " ".join(words), "label": label}))
        (folder / f"{split}.jsonl").write_text("\n".join(lines) + "\n")
    return folder


@pytest.fixture
def plain_report(monkeypatch) -> None:
    """report.json alone: drawing the page takes longer than these trainings."""

    def write(folder: Path, report: dict[str, Any]) -> None:
        save_json(folder / "report.json", report)

    monkeypatch.setattr("neural_layers.distill.recipes.ntmm.write_report", write)


def distill(*arguments: Any) -> int:
    """The exit status of the command."""
    return main(["distill", "ntmm", *map(str, arguments)])


def refused(capsys: Any, *arguments: Any) -> str:
    """The one line that a refused command prints."""
    assert distill(*arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("neural-layers: ")
    assert said.count("\n") == 1
    return str(said)
