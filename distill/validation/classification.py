"""Validating a classifier beside its teacher."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from neural_layers.distill.validation.class_scores import Labels, Predictions, class_analysis, class_measures
from neural_layers.distill.validation.measures import Array, Measure
from neural_layers.distill.validation.recording import RecordingValidator, Resampling, digest, fingerprint


@dataclass(frozen=True)
class ClassificationOptions:
    """How a classifier is validated.

    worst:      how many of the most confident wrong answers are shown
    compared:   the metrics that are compared with earlier validations
    resampling: how
    """

    worst: int = 5
    compared: tuple[str, ...] = ("accuracy", "macro_f1")
    resampling: Resampling = field(default_factory=Resampling)


class ClassificationValidator(RecordingValidator):
    """Scores a classifier on examples, beside its teacher; keeps and compares validations as `RecordingValidator`.

    A file also holds the scores of each class with the confusion matrix and the reliability table (`classes`), the
    `worst` answers, and the predictions, their confidences and losses of all examples. The teacher answers once, and
    `folder/teacher.json` keeps its answers, for runs that are taken up again.

    examples:   each a dict with `input_ids` and its label, as `collate` wants them
    collate:    makes a batch of some: `labels` (B,), and what the models take
    classes:    their names, by number
    teacher:    takes the same batches
    texts:      of the examples, to show them; without them they are shown by number
    Raises ValueError without examples, or where texts and examples differ in number.
    """

    def __init__(
        self,
        examples: Sequence[Mapping[str, Any]],
        collate: Callable[[list[Any]], dict[str, Any]],
        folder: Path,
        *,
        classes: Sequence[str],
        teacher: nn.Module | None = None,
        texts: Sequence[str] | None = None,
        batch_size: int = 64,
        options: ClassificationOptions | None = None,
    ) -> None:
        if not len(examples):
            raise ValueError("no examples to validate on; give at least one")
        self.texts = [f"example {i}" for i in range(len(examples))] if texts is None else list(texts)
        if len(self.texts) != len(examples):
            raise ValueError(f"{len(self.texts)} texts for {len(examples)} examples; expected as many")
        self.examples, self.collate, self.classes, self.teacher = examples, collate, list(classes), teacher
        self.batch_size, self.options = batch_size, options or ClassificationOptions()
        lengths = [len(examples[i]["input_ids"]) for i in range(len(examples))]
        self._order = sorted(range(len(examples)), key=lengths.__getitem__)
        self.labels = self._labels()
        data = digest([repr((self.classes, self.labels.tolist())), *self.texts, *map(_ids, self._in_order())])
        super().__init__(folder, data, self.options.compared, self.options.resampling)
        self._teachers: Predictions | None = None

    def validate(self, model: nn.Module) -> tuple[dict[str, Any], dict[str, Measure], dict[str, Measure] | None]:
        predictions = {"student": self.predict(model)}
        if self.teacher is not None:
            predictions["teacher"] = self._teacher(self.teacher)
        measures = {name: class_measures(found, self.labels, len(self.classes)) for name, found in predictions.items()}
        details = {
            "examples": len(self.examples),
            "classes": class_analysis(self.labels, self.classes, predictions),
            "worst": worst_answers(self.texts, self.labels, self.classes, predictions, self.options.worst),
            **predictions["student"].as_dict(),
        }
        return details, measures["student"], measures.get("teacher")

    def restore(self, record: dict[str, Any]) -> dict[str, Measure]:
        return class_measures(Predictions.from_dict(record), self.labels, len(self.classes))

    def predict(self, model: nn.Module) -> Predictions:
        """What a model says of the examples. Raises InputError where it says NaN."""
        return Predictions.of(self._logits(model), self.labels)

    @torch.no_grad()
    def _logits(self, model: nn.Module) -> Array:
        was_training, device = model.training, next(model.parameters()).device
        model.eval()
        found = []
        for batch in self._batches():
            inputs = {name: value.to(device) for name, value in batch.items() if name not in ("labels", "index")}
            found.append(model(**inputs).logits.double().cpu().numpy())
        model.train(was_training)
        return np.concatenate(found)[np.argsort(self._order)]

    def _teacher(self, teacher: nn.Module) -> Predictions:
        if self._teachers is None:
            made_by = {"data": self.data, "teacher": fingerprint(teacher)}
            kept = self.teacher_record(made_by, lambda: self.predict(teacher).as_dict())
            self._teachers = Predictions.from_dict(kept)
        return self._teachers

    def _labels(self) -> Labels:
        labels = np.concatenate([batch["labels"].numpy() for batch in self._batches()])
        return labels[np.argsort(self._order)].astype(np.int64)

    def _batches(self) -> Iterator[dict[str, Tensor]]:
        for start in range(0, len(self._order), self.batch_size):
            yield self.collate([self.examples[i] for i in self._order[start : start + self.batch_size]])

    def _in_order(self) -> list[Mapping[str, Any]]:
        return [self.examples[i] for i in range(len(self.examples))]


def worst_answers(
    texts: Sequence[str], labels: Labels, classes: Sequence[str], predictions: Mapping[str, Predictions], count: int
) -> list[dict[str, Any]]:
    """The wrong answers of the student that it is surest of: `text`, `label`, its `confidence`, and the answer of each
    model under its name."""
    found = predictions["student"]
    wrong = np.flatnonzero(found.classes != labels)
    rows = wrong[np.argsort(-found.confidence[wrong], kind="stable")][:count].tolist()
    return [
        {
            "text": texts[i],
            "label": classes[labels[i]],
            "confidence": float(found.confidence[i]),
            **{name: classes[model.classes[i]] for name, model in predictions.items()},
        }
        for i in rows
    ]


def _ids(example: Mapping[str, Any]) -> str:
    return repr([int(token) for token in example["input_ids"]])
