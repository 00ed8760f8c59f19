"""Teacher, student and baseline on the test texts: the parts of the report that need the models."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from tqdm.auto import tqdm

from neural_layers.distill.classification.data import ClassificationData
from neural_layers.distill.compression import Threshold, compress, measure_compressed, predictor
from neural_layers.distill.gate import QualityGate
from neural_layers.distill.recipes.described import described_models, described_retention
from neural_layers.distill.recipes.trained import Trained
from neural_layers.distill.validation.class_scores import Predictions, class_analysis, class_measures
from neural_layers.distill.validation.classification import worst_answers
from neural_layers.distill.validation.measures import Measure
from neural_layers.distill.validation.recording import scores
from neural_layers.timing import measure_latency, measure_throughput

RETAINED = ("accuracy", "macro_f1")
_TIMED_TEXTS, _BATCHED_TEXTS, _WORST, _RANDOM = 100, 256, 8, 6


@dataclass(frozen=True)
class Tested:
    """What the models say of the test texts: their predictions and measures, by the model's name."""

    predictions: dict[str, Predictions]
    measures: dict[str, dict[str, Measure]]


def ask_models(models: Mapping[str, nn.Module], tokenizer: Any, data: ClassificationData) -> Tested:
    """Ask each model for the class of every test text."""
    labels = np.array(data.test.labels)
    predictions = {}
    for name, model in tqdm(models.items(), desc="test", unit="model"):
        logits = predictor(model, tokenizer, "classification")(data.test.texts)
        predictions[name] = Predictions.of(logits, labels)
    return Tested(predictions, {n: class_measures(p, labels, len(data.classes)) for n, p in predictions.items()})


def compare(
    models: Mapping[str, nn.Module],
    trained: Mapping[str, Trained],
    tested: Tested,
    tokenizer: Any,
    data: ClassificationData,
    folders: Mapping[str, Path],
    gate: QualityGate,
) -> dict[str, Any]:
    """The parts `models`, `retention`, `retention_interval`, `classes` and `examples` of the report.

    folders: where the weights of each model lie. gate: says how intervals are made
    """
    predict = {name: predictor(model, tokenizer, "classification") for name, model in models.items()}
    one = {name: _one(ask) for name, ask in predict.items()}
    latency = measure_latency(one, data.test.texts[:_TIMED_TEXTS])
    throughput = measure_throughput(predict, data.test.texts[:_BATCHED_TEXTS])
    labels = np.array(data.test.labels)
    how: dict[str, Any] = {"samples": gate.samples, "confidence": gate.confidence}
    return {
        "models": described_models(models, folders, tested.measures, trained, latency, throughput),
        **described_retention(tested.measures["student"], tested.measures["teacher"], RETAINED, **how),
        "classes": class_analysis(labels, data.classes, tested.predictions),
        "examples": _examples(data, tested.predictions),
    }


def compressed(
    student: nn.Module,
    tokenizer: Any,
    variants: str,
    folder: Path,
    tested: Tested,
    data: ClassificationData,
    gate: QualityGate,
) -> list[dict[str, Any]]:
    """The part `compression` of the report; the forms are saved in `folder`/compressed."""
    labels = np.array(data.test.labels)

    def evaluate(predict: Callable[[Sequence[str]], Any]) -> dict[str, Measure]:
        return class_measures(Predictions.of(predict(data.test.texts), labels), labels, len(data.classes))

    forms = compress(
        student,
        tokenizer,
        variants,
        folder / "compressed",
        "classification",
        student_folder=folder / "student",
        tell=tqdm.write,
    )
    return measure_compressed(
        forms,
        evaluate,
        Threshold(RETAINED, gate.min_retention),
        teacher=scores(tested.measures["teacher"]),
        student=scores(tested.measures["student"]),
        examples=data.test.texts[:_TIMED_TEXTS],
        tell=tqdm.write,
    )


def _one(ask: Callable[[Sequence[str]], Any]) -> Callable[[str], Any]:
    return lambda text: ask([text])


def _examples(data: ClassificationData, predictions: Mapping[str, Predictions]) -> list[dict[str, Any]]:
    """The surest wrong answers of the student, and some texts at random."""
    labels = np.array(data.test.labels)
    worst = worst_answers(data.test.texts, labels, data.classes, predictions, _WORST)
    shown = [{"kind": "worst", **entry} for entry in worst]
    known = {entry["text"] for entry in worst}
    others = [i for i, text in enumerate(data.test.texts) if text not in known]
    for i in random.Random(0).sample(others, min(_RANDOM, len(others))):
        answers = {name: data.classes[found.classes[i]] for name, found in predictions.items()}
        confidence = float(predictions["student"].confidence[i])
        entry = {"text": data.test.texts[i], "label": data.classes[labels[i]], "confidence": confidence}
        shown.append({"kind": "random", **entry, **answers})
    return shown
