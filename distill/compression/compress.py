"""Making the compressed forms of a student."""

import copy
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from neural_layers.distill.compression.variants import DESCRIPTIONS, ONNX_WEIGHTS, SCHEMES, check_variants
from neural_layers.errors import InputError
from neural_layers.wrappers.modules import tensor_bytes
from neural_layers.wrappers.quantization import quantize, save_quantized

STUDENT = "student"  # the name of the form that is not compressed
BATCH = 32


@dataclass(frozen=True)
class Compressed:
    """A form of the student that can be asked as the student can.

    predict:      texts to what the model makes of them, in their order: translations (a list of texts), or a
                  classifier's logits, float32 (texts, labels). None where the form could not be made.
    folder:       where it lies; None for the student itself, which its run has saved
    file_bytes:   of its weights on disk. memory_bytes: of its weights as held while it runs
    note:         what it is, or why it could not be made
    """

    name: str
    predict: Callable[[Sequence[str]], Any] | None
    folder: Path | None
    file_bytes: int | None
    memory_bytes: int | None
    note: str


def compress(
    student: Any,
    tokenizer: Any,
    variants: str | Sequence[str],
    folder: Path,
    kind: str,
    *,
    student_folder: Path | None = None,
    batch_size: int = BATCH,
    tell: Callable[[str], None] = lambda line: None,
) -> dict[str, Compressed]:
    """Each variant of a trained student by name, saved in `folder/NAME`; the first is the student itself, unchanged.

    student:   a transformers encoder-decoder with `generate`, or a sequence classifier. It is left as it is.
    variants, kind: as `check_variants` takes them
    student_folder: where the student's safetensors lie, for its size
    tell:      called with a line on each form, before it is made and where it could not be

    A form whose graph differs from the model, or that this architecture has not, is returned without `predict` and with
    the reason as its note. Raises InputError for names that there are not.
    """
    student.eval()
    forms = {STUDENT: _student(student, tokenizer, kind, student_folder, batch_size)}
    for name in check_variants(variants, kind):
        tell(f"{name}: {DESCRIPTIONS[name]}")
        target = folder / name
        if target.exists():
            shutil.rmtree(target)
        try:
            forms[name] = _make(name, student, tokenizer, target, kind, batch_size)
        except ValueError as problem:  # of which InputError and VerificationError are two
            shutil.rmtree(target, ignore_errors=True)
            forms[name] = Compressed(name, None, None, None, None, f"could not be made: {problem}")
            tell(f"{name} {forms[name].note}")
    return forms


def _student(student: Any, tokenizer: Any, kind: str, folder: Path | None, batch_size: int) -> Compressed:
    size = None if folder is None else _files(folder)
    dtype = str(next(student.parameters()).dtype).removeprefix("torch.")
    note = f"as trained, {dtype}"
    return Compressed(STUDENT, predictor(student, tokenizer, kind, batch_size), None, size, tensor_bytes(student), note)


def _make(name: str, student: Any, tokenizer: Any, target: Path, kind: str, batch_size: int) -> Compressed:
    model: Any
    if name in ONNX_WEIGHTS:
        from neural_layers.distill.compression.graphs import ServedTranslator, weight_bytes
        from neural_layers.models.export import export_onnx

        export_onnx(student, target, quantize=ONNX_WEIGHTS[name], tokenizer=tokenizer)
        model, memory = ServedTranslator(target), weight_bytes(target)
    else:
        model = made_in_torch(name, student, target)
        tokenizer.save_pretrained(target)
        memory = tensor_bytes(model)
    predict = predictor(model, tokenizer, kind, batch_size)
    return Compressed(name, predict, target, _files(target), memory, DESCRIPTIONS[name])


def made_in_torch(name: str, student: Any, target: Path) -> Any:
    """The form of that name of a transformers model, saved in `target`, from where `from_pretrained` loads it.

    Raises ValueError where `quantize` finds no layer for it.
    """
    model = copy.deepcopy(student).eval()
    if name in SCHEMES:
        quantize(model, SCHEMES[name])
        save_quantized(model, target)
    else:
        model = model.to(torch.bfloat16)
        model.save_pretrained(target)
    return model


def predictor(model: Any, tokenizer: Any, kind: str, batch_size: int = BATCH) -> Callable[[Sequence[str]], Any]:
    """What `Compressed.predict` is: greedy translations, or logits (texts, labels).

    A classifier's texts are cut to the model's `max_position_embeddings`, or to the tokenizer's `model_max_length`
    where that is less.
    """
    if kind == "translation":
        from neural_layers.distill.validation.translation import translate

        return lambda texts: translate(model, tokenizer, texts, batch_size=batch_size)
    if kind == "classification":
        return lambda texts: _logits(model, tokenizer, texts, batch_size)
    raise InputError(f"kind={kind!r} must be translation or classification")


@torch.no_grad()
def _logits(model: Any, tokenizer: Any, texts: Sequence[str], batch_size: int) -> Any:
    model.eval()
    limit = min(
        getattr(model.config, "max_position_embeddings", tokenizer.model_max_length), tokenizer.model_max_length
    )
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    rows = []
    for start in range(0, len(order), batch_size):
        chosen = [texts[i] for i in order[start : start + batch_size]]
        batch = tokenizer(chosen, return_tensors="pt", padding=True, truncation=True, max_length=limit)
        found = model(
            input_ids=batch["input_ids"].to(model.device), attention_mask=batch["attention_mask"].to(model.device)
        )
        rows.append(found.logits.float().cpu())
    logits = torch.cat(rows)
    back = torch.empty(len(order), dtype=torch.int64)
    back[torch.tensor(order)] = torch.arange(len(order))
    return logits[back].numpy()


def _files(folder: Path) -> int:
    kinds = (".safetensors", ".onnx", ".data")
    return sum(file.stat().st_size for file in folder.iterdir() if file.suffix in kinds)
