"""Making a teacher cache.

Letters: N rows of a batch, n rows of a chunk, k entries, V vocabulary.
"""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from torch import Tensor, nn

from neural_layers.distill.data.batches import IGNORED_LABEL
from neural_layers.distill.files import replacing, save_json
from neural_layers.distill.losses.outputs import Outputs
from neural_layers.distill.losses.top_k import TopK
from neural_layers.distill.teacher_cache.error import CacheError
from neural_layers.distill.teacher_cache.fingerprint import batches, data_hash, weights_hash
from neural_layers.distill.teacher_cache.store import FORMAT, TeacherCache, read_meta
from neural_layers.errors import InputError

_MOST_ROWS, _MOST_LOGITS = 256, 2**25
# Batches and rows of each that the error is measured on.
_SAMPLED_BATCHES, _SAMPLED_ROWS = 32, 16


@torch.no_grad()
def build_cache(
    folder: Path,
    task: Any,
    teacher: nn.Module,
    examples: Any,
    collate: Callable[[list[Any]], dict[str, Tensor]],
    *,
    k: int = 64,
    temperature: float,
    batch_size: int = 32,
    logits: str = "float16",
    student: nn.Module | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> TeacherCache:
    """The k largest logits of `teacher` for every label of every example, on disk; found again where they are there.

    task:        gives `outputs(model, batch, with_states)` and `labels(batch)`, as for training
    examples:    `len` and `[i]`; collate: makes a batch of a list of them
    k:           entries of a row; all of them, and nothing is lost but by rounding, where the vocabulary has no more
    temperature: T of the loss, for which the mass outside is kept
    logits:      "float16" or "float32", how they are kept
    student:     what the approximation's error is measured against; by default the uniform distribution
    progress:    called with the examples that are done, and all

    Prints one line with the size and the error, which `meta.json` keeps. The folder appears whole or not at all.
    Raises InputError for numbers out of range, examples that change or are none, labels of which none counts, logits
    that are not finite, and for a folder with another cache (naming what differs) or with something else.
    """
    _check(examples, k, temperature, batch_size, logits)
    made_of = {
        "teacher": weights_hash(teacher),
        "data": data_hash(examples, collate),
        "temperature": float(temperature),
        "logits": logits,
    }
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        cache = _found(folder, made_of, k)
        print(cache.summary)
        return cache
    folder.parent.mkdir(parents=True, exist_ok=True)
    models = [teacher] if student is None else [teacher, student]
    modes = [model.training for model in models]
    for model in models:
        model.eval()
    try:
        with replacing(folder) as beside:
            beside.mkdir()
            builder = _Builder(beside, task, teacher, student, k, temperature, np.dtype(logits))
            meta = builder.run(batches(examples, collate, batch_size), len(examples), batch_size, progress)
            save_json(beside / "meta.json", {"format": FORMAT, **made_of, "examples": len(examples), **meta})
    finally:
        for model, mode in zip(models, modes, strict=True):
            model.train(mode)
    cache = TeacherCache(folder)
    print(cache.summary)
    return cache


def _check(examples: Any, k: int, temperature: float, batch_size: int, logits: str) -> None:
    if k < 1 or batch_size < 1:
        raise InputError(f"k={k} and batch_size={batch_size} must be at least 1")
    if not 0 < temperature < math.inf:
        raise InputError(f"temperature={temperature} must be positive and finite")
    if logits not in ("float16", "float32"):
        raise InputError(f"logits={logits!r} must be 'float16' or 'float32'")
    if not len(examples):
        raise InputError("no examples to run the teacher on; give at least one")
    if hasattr(examples, "in_epoch"):
        raise InputError("examples that change from epoch to epoch have no teacher cache; turn the augmentation off")


def _found(folder: Path, made_of: dict[str, Any], k: int) -> TeacherCache:
    meta = read_meta(folder)
    wanted = {**made_of, "k": min(k, meta["vocabulary"])}
    for name, value in wanted.items():
        if meta.get(name) != value:
            raise InputError(
                f"the teacher cache in {folder} was built with {name}={meta.get(name)}, and {name}={value} is wanted; "
                f"give another folder, or remove that one"
            )
    return TeacherCache(folder)


class _Builder:
    """One run of the teacher over all examples."""

    def __init__(
        self,
        folder: Path,
        task: Any,
        teacher: nn.Module,
        student: nn.Module | None,
        k: int,
        temperature: float,
        dtype: np.dtype,
    ) -> None:
        self.folder, self.task, self.teacher, self.student = folder, task, teacher, student
        self.k, self.temperature, self.dtype = k, temperature, dtype
        self.offsets, self.vocabulary = [0], 0
        self.error = CacheError("uniform distribution" if student is None else "student")

    def run(
        self,
        given: Iterator[dict[str, Tensor]],
        examples: int,
        batch_size: int,
        progress: Callable[[int, int], None] | None,
    ) -> dict[str, Any]:
        """Write the arrays; returns what `meta.json` says of them."""
        device = next((p.device for p in self.teacher.parameters()), torch.device("cpu"))
        every = math.ceil(examples / batch_size / _SAMPLED_BATCHES)
        done = 0
        with (
            (self.folder / "indices.bin").open("wb") as indices,
            (self.folder / "logits.bin").open("wb") as logits,
            (self.folder / "rest.bin").open("wb") as rest,
        ):
            for number, batch in enumerate(given):
                batch = {n: v.to(device) if isinstance(v, Tensor) else v for n, v in batch.items()}
                self._write(batch, (indices, logits, rest), is_sampled=number % every == 0)
                done += len(batch["index"])
                if progress is not None:
                    progress(done, examples)
        if self.offsets[-1] == 0:
            raise InputError(f"none of the {examples} examples has a label that counts; the teacher has nothing to say")
        np.array(self.offsets, dtype="<i8").tofile(self.folder / "offsets.bin")
        return {
            "rows": self.offsets[-1],
            "k": min(self.k, self.vocabulary),
            "vocabulary": self.vocabulary,
            "error": self.error.result(),
        }

    def _write(self, batch: dict[str, Tensor], files: tuple[BinaryIO, BinaryIO, BinaryIO], is_sampled: bool) -> None:
        labels = self.task.labels(batch)
        counted = labels != IGNORED_LABEL
        lengths = counted.reshape(len(labels), -1).sum(dim=1).cpu()
        owners = batch["index"].cpu().repeat_interleave(lengths)
        outputs = self.task.outputs(self.teacher, batch, with_states=False).rows(counted)
        self.vocabulary = outputs.vocabulary
        for start, logits in _chunks(outputs):
            is_wrong = ~logits.isfinite().all(dim=-1)
            if is_wrong.any():
                example = owners[start + int(is_wrong.nonzero()[0])].item()
                raise InputError(f"the teacher's logits of example {example} are not finite; it cannot teach")
            stored = self._stored(logits)
            for file, array in zip(files, stored, strict=True):
                file.write(array.tobytes())
            self.error.add(torch.from_numpy(stored[2][:, 0]))
        self.offsets += (self.offsets[-1] + lengths.cumsum(0)).tolist()
        if is_sampled and len(owners):
            self._sample(batch, counted, outputs)

    def _stored(self, logits: Tensor) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of logits (n, V): indices and logits (n, k), and the log masses outside (n, 2) at T and at 1."""
        values, indices = logits.topk(min(self.k, logits.shape[-1]), dim=-1)
        rests = []
        for temperature in (self.temperature, 1.0):
            log_p = torch.log_softmax(logits / temperature, dim=-1)
            rests.append(log_p.scatter_(-1, indices, -torch.inf).logsumexp(dim=-1))
        # The distance from the largest rounds less than the logit does, and fits float16, whatever the logits' size.
        shifted = (values - values[:, :1]).clamp_min(torch.finfo(torch.float16).min)
        rest = torch.stack(rests, dim=-1).float().cpu().numpy().astype("<f4")
        little = self.dtype.newbyteorder("<")
        return indices.cpu().numpy().astype("<i4"), shifted.cpu().numpy().astype(little), rest

    def _sample(self, batch: dict[str, Tensor], counted: Tensor, outputs: Outputs) -> None:
        rows = int(counted.sum())
        chosen = torch.arange(0, rows, math.ceil(rows / _SAMPLED_ROWS), device=counted.device)
        teacher = _some_logits(outputs, chosen)
        student = None
        if self.student is not None:
            student = _some_logits(self.task.outputs(self.student, batch, with_states=False).rows(counted), chosen)
        indices, logits, rest = (torch.from_numpy(array.copy()).to(chosen.device) for array in self._stored(teacher))
        stored = TopK(indices.long(), logits.float(), rest[:, 0], self.temperature, self.vocabulary)
        self.error.compare(teacher, stored, student)


def _some_logits(outputs: Outputs, chosen: Tensor) -> Tensor:
    if outputs.logits is not None:
        return outputs.logits[chosen]
    assert outputs.hidden is not None
    return Outputs(hidden=outputs.hidden[chosen], head=outputs.head).all_logits()


def _chunks(outputs: Outputs) -> Iterator[tuple[int, Tensor]]:
    """The number of the first row, and the logits (n, V) of a few rows."""
    rows = outputs.hidden if outputs.logits is None else outputs.logits
    assert rows is not None
    size = max(16, min(_MOST_ROWS, _MOST_LOGITS // outputs.vocabulary))
    for start in range(0, len(rows), size):
        chosen = torch.arange(start, min(start + size, len(rows)), device=rows.device)
        yield start, _some_logits(outputs, chosen)
