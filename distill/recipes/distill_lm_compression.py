"""Compressed forms of a language model, each asked as the student is: for the loss of a text's windows."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from neural_layers.distill.compression.compress import STUDENT, Compressed, made_in_torch
from neural_layers.distill.compression.variants import DESCRIPTIONS, ONNX_WEIGHTS
from neural_layers.distill.recipes.distill_lm_validation import LanguageTest, score
from neural_layers.distill.text.packing import Packed
from neural_layers.distill.validation.measures import Array
from neural_layers.errors import InputError, require
from neural_layers.wrappers.modules import tensor_bytes


def check_forms(variants: str) -> list[str]:
    """The names of `--compress`. Raises InputError for one that there is not or that is given twice; ImportError where
    a graph is wanted without the extra `onnx`."""
    names = [name.strip() for name in variants.split(",")]
    for i, name in enumerate(names):
        if name not in DESCRIPTIONS:
            raise InputError(f"there is no compressed form {name!r}; there are {', '.join(DESCRIPTIONS)}")
        if name in names[:i]:
            raise InputError(f"the compressed form {name} is given twice; give it once")
    if any(name in ONNX_WEIGHTS for name in names):
        require("onnx", "onnxruntime", extra="onnx")
    return names


def compress_language_model(
    student: Any, tokenizer: Any, names: Sequence[str], folder: Path, test: LanguageTest, tell: Callable[[str], None]
) -> dict[str, Compressed]:
    """The student and each form of it, saved in `folder`/compressed; `predict` takes windows and gives their sums.

    A form whose graph differs from the model, or that this architecture has not, is returned without `predict` and with
    the reason as its note.
    """
    size = _bytes(folder / STUDENT)
    forms = {
        STUDENT: Compressed(STUDENT, reader(student, test), None, size, tensor_bytes(student), "as trained, float32")
    }
    for name in names:
        tell(f"{name}: {DESCRIPTIONS[name]}")
        target = folder / "compressed" / name
        shutil.rmtree(target, ignore_errors=True)
        try:
            forms[name] = _made(name, student, tokenizer, target, test)
        except ValueError as problem:  # of which InputError and VerificationError are two
            shutil.rmtree(target, ignore_errors=True)
            forms[name] = Compressed(name, None, None, None, None, f"could not be made: {problem}")
            tell(f"{name} {forms[name].note}")
    return forms


def reader(model: nn.Module, test: LanguageTest) -> Callable[[Sequence[Any]], Array]:
    """What gives the sums of windows by a model."""
    return lambda windows: score(model, windows, test.batch_size)


def _made(name: str, student: Any, tokenizer: Any, target: Path, test: LanguageTest) -> Compressed:
    if name in ONNX_WEIGHTS:
        from neural_layers.distill.compression.graphs import weight_bytes
        from neural_layers.models.export import OnnxModel, export_onnx

        export_onnx(student, target, quantize=ONNX_WEIGHTS[name], tokenizer=tokenizer)
        served = OnnxModel(target, threads=torch.get_num_threads())
        return Compressed(
            name,
            lambda windows: _by_graph(served, windows),
            target,
            _bytes(target),
            weight_bytes(target),
            DESCRIPTIONS[name],
        )
    model = made_in_torch(name, student, target)
    tokenizer.save_pretrained(target)
    return Compressed(name, reader(model, test), target, _bytes(target), tensor_bytes(model), DESCRIPTIONS[name])


def _by_graph(served: Any, windows: Sequence[Any]) -> Array:
    """The sums of windows; a graph knows no borders, so each document goes through it by itself."""
    return np.stack([_window_by_graph(served, window) for window in windows])


def _window_by_graph(served: Any, window: Packed) -> Array:
    nats, predicted = 0.0, 0
    starts = np.flatnonzero(window.position_ids == 0).tolist()
    for start, end in zip(starts, [*starts[1:], len(window.input_ids)], strict=True):
        targets = torch.from_numpy(window.labels[start + 1 : end])
        if (targets == -100).all():
            continue
        logits, _ = served.forward(window.input_ids[None, start:end])
        found = F.cross_entropy(torch.from_numpy(logits)[0, :-1].float(), targets, reduction="sum")
        nats, predicted = nats + float(found), predicted + int((targets != -100).sum())
    return np.array([nats, predicted], dtype=np.float64)


def _bytes(folder: Path) -> int:
    kinds = (".safetensors", ".onnx", ".data")
    return sum(file.stat().st_size for file in folder.iterdir() if file.suffix in kinds)
