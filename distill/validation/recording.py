"""Validations that are kept as files, and compared with the ones before."""

import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from neural_layers.distill.files import save_json
from neural_layers.distill.validation.bootstrap import paired_bootstrap, ratio_interval
from neural_layers.distill.validation.measures import Measure
from neural_layers.errors import InputError


@dataclass(frozen=True)
class Resampling:
    """The arguments of `paired_bootstrap`."""

    samples: int = 1000
    confidence: float = 0.95
    seed: int = 0


class RecordingValidator(ABC):
    """`validate(model, step) → scores`, with every validation kept as `folder/step-N.json`.

    The file holds the scores of the model and of the teacher, what it keeps of them, the comparison with the previous
    validation (the last step before this one) and with the best, and all outputs, so that `load` has the measures of
    an earlier step without a model. It holds no times: two equal runs write equal files.

    folder:     where the files are
    data:       names the examples (`digest`), so that files of other examples are refused
    compared:   the metrics which are compared with earlier validations and the teacher
    resampling: how

    measures: those of the last call
    """

    def __init__(self, folder: Path, data: str, compared: tuple[str, ...], resampling: Resampling) -> None:
        self.folder, self.data, self.compared, self.resampling = folder, data, compared, resampling
        self.measures: dict[str, Measure] = {}
        self._best: int | None = None
        self._known: dict[int, dict[str, Measure]] = {}

    @abstractmethod
    def validate(self, model: nn.Module) -> tuple[dict[str, Any], dict[str, Measure], dict[str, Measure] | None]:
        """The record of a validation, the model's measures, and the teacher's where there is one."""

    @abstractmethod
    def restore(self, record: dict[str, Any]) -> dict[str, Measure]:
        """The model's measures out of a record."""

    def __call__(self, model: nn.Module, step: int) -> dict[str, float]:
        details, measures, teacher = self.validate(model)
        record: dict[str, Any] = {"step": step, "data": self.data, "model": scores(measures)}
        if teacher is not None:
            record |= {"teacher": scores(teacher), **self._kept(measures, teacher)}
        previous = max((known for known in self.steps() if known < step), default=None)
        best = self._best if self._best != step else None
        record["compared"] = {
            name: self._comparison(measures, earlier) for name, earlier in (("previous", previous), ("best", best))
        }
        save_json(self._path(step), record | details)
        self.measures = self._known[step] = measures
        return record["model"]

    def load(self, step: int) -> dict[str, Measure]:
        """The measures of an earlier step, out of its file.

        Raises InputError where the file is missing, broken, or of other examples.
        """
        if step not in self._known:
            self._known[step] = self.restore(self.record(step))
        return self._known[step]

    def set_best(self, step: int | None) -> None:
        """Which earlier step counts as the best from now on; None for none."""
        self._best = step

    def steps(self) -> list[int]:
        """The steps that have a file."""
        names = (re.fullmatch(r"step-(\d+)\.json", path.name) for path in self.folder.glob("step-*.json"))
        return sorted(int(name[1]) for name in names if name)

    @property
    def history(self) -> list[dict[str, float]]:
        """The model's scores at every step that has a file: `{"step": …, "bleu": …, …}`."""
        return [{"step": step, **self.record(step)["model"]} for step in self.steps()]

    def record(self, step: int) -> dict[str, Any]:
        """What the file of a step holds. Raises as `load`."""
        path = self._path(step)
        try:
            record = json.loads(path.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise InputError(f"{path}: no such validation; there are those of steps {self.steps()}") from None
        except ValueError as error:
            raise InputError(f"{path}: not a validation ({error}); remove it and validate that step again") from error
        if not isinstance(record, dict) or record.get("data") != self.data:
            raise InputError(
                f"{path}: a validation on other examples; give the same data, or another folder for the run"
            )
        return record

    def teacher_record(self, made_by: dict[str, Any], make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What `folder/teacher.json` holds where `made_by` stands in it; else what `make` returns, which is saved."""
        path = self.folder / "teacher.json"
        kept = _read(path)
        if any(kept.get(name) != value for name, value in made_by.items()):
            kept = made_by | make()
            save_json(path, kept)
        return kept

    def _path(self, step: int) -> Path:
        return self.folder / f"step-{step}.json"

    def _kept(self, student: dict[str, Measure], teacher: dict[str, Measure]) -> dict[str, Any]:
        kept = {name: ratio_interval(student[name], teacher[name], **asdict(self.resampling)) for name in self.compared}
        return {
            "retention": {name: None if ratio is None else round(ratio[0], 6) for name, ratio in kept.items()},
            "retention_interval": {
                name: [round(end, 6) for end in ratio[1:]] for name, ratio in kept.items() if ratio is not None
            },
        }

    def _comparison(self, measures: dict[str, Measure], step: int | None) -> dict[str, Any] | None:
        if step is None:
            return None
        earlier, options = self.load(step), asdict(self.resampling)
        comparisons = {name: paired_bootstrap(measures[name], earlier[name], **options) for name in self.compared}
        return {"step": step, **{name: rounded(found.as_dict()) for name, found in comparisons.items()}}


def _read(path: Path) -> dict[str, Any]:
    """The object in a file; an empty one where there is none, or it is broken."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def scores(measures: Mapping[str, Measure]) -> dict[str, float]:
    """The scores of all examples, to six decimals."""
    return {name: round(measure.value, 6) for name, measure in measures.items()}


def rounded(content: Any) -> Any:
    """Lists and dicts with every float to six decimals."""
    if isinstance(content, dict):
        return {name: rounded(value) for name, value in content.items()}
    if isinstance(content, list | tuple):
        return [rounded(value) for value in content]
    return round(content, 6) if isinstance(content, float) else content


def digest(parts: Iterable[str]) -> str:
    """A name for a list of texts, which other lists do not have."""
    whole = hashlib.sha256()
    for part in parts:
        data = part.encode("utf-8", "surrogatepass")
        whole.update(len(data).to_bytes(8, "little") + data)
    return whole.hexdigest()


def fingerprint(model: nn.Module) -> str:
    """A name for a model, of the names, shapes, dtypes and about a thousand values of its parameters and buffers."""
    whole = hashlib.sha256()
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        values = tensor.detach().reshape(-1)
        values = values[:: max(1, len(values) // 1000)].cpu().contiguous()
        whole.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
        whole.update(values.view(torch.uint8).numpy().tobytes())
    return whole.hexdigest()
