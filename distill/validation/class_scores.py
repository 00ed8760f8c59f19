"""How good a classifier is: accuracy, F1 by class and on average, calibration, loss."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from neural_layers.distill.validation.measures import Array, Measure, divide, mean_measure
from neural_layers.errors import InputError

_BINS = 15
Labels = NDArray[np.int64]


@dataclass(frozen=True, eq=False)
class Predictions:
    """What a classifier says of n examples.

    classes:    (n,) int64, the most probable class
    confidence: (n,) its probability
    loss:       (n,) −ln p of the right class; this and the confidence to six decimals, as records have them
    """

    classes: Labels
    confidence: Array
    loss: Array

    @classmethod
    def of(cls, logits: Array, labels: Labels) -> "Predictions":
        """Of logits (n, C) and the right classes (n,).

        Raises InputError where a logit is NaN or infinite, ValueError for labels that are no class of the model's.
        """
        if not np.isfinite(logits).all():
            row = int(np.argmin(np.isfinite(logits).all(axis=1)))
            raise InputError(f"the model's logits of example {row} are {logits[row].tolist()}; lower the learning rate")
        if len(labels) and not 0 <= labels.min() <= labels.max() < logits.shape[1]:
            raise ValueError(f"labels {labels.min()} to {labels.max()} for a model of {logits.shape[1]} classes")
        logits = np.asarray(logits, dtype=np.float64)
        logits = logits - logits.max(axis=1, keepdims=True)
        logarithms = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
        rows, chosen = np.arange(len(labels)), logits.argmax(axis=1)
        # + 0.0 turns −0.0 into 0.0, which is how records write it.
        return cls(chosen, np.exp(logarithms[rows, chosen]).round(6), (-logarithms[rows, labels]).round(6) + 0.0)

    def as_dict(self) -> dict[str, Any]:
        """For a record; `from_dict` reads it."""
        return {
            "predictions": self.classes.tolist(),
            "confidences": self.confidence.tolist(),
            "losses": self.loss.tolist(),
        }

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> "Predictions":
        return cls(
            np.array(record["predictions"], dtype=np.int64),
            np.array(record["confidences"], dtype=np.float64),
            np.array(record["losses"], dtype=np.float64),
        )


def class_measures(predictions: Predictions, labels: Labels, number: int) -> dict[str, Measure]:
    """`accuracy`, `macro_f1` (0 … 1), `calibration_error` and `loss` (lower is better), of so many classes.

    macro_f1:          the mean of the F1 of the classes that have examples
    calibration_error: arXiv 1706.04599, 15 bins: Σ over bins |right answers − sum of confidences| / examples
    Raises ValueError where the numbers of examples differ.
    """
    if len(labels) != len(predictions.classes):
        raise ValueError(f"{len(predictions.classes)} predictions for {len(labels)} labels; expected as many")
    rows, right = np.arange(len(labels)), (predictions.classes == labels).astype(np.float64)
    counts = np.zeros((len(labels), 3, number))
    counts[rows, 0, labels] = right
    counts[rows, 1, predictions.classes] = 1
    counts[rows, 2, labels] = 1
    bins = np.zeros((len(labels), 2, _BINS))
    bins[rows, 0, _bin(predictions.confidence)] = predictions.confidence - right
    bins[rows, 1, _bin(predictions.confidence)] = 1
    measures = (
        mean_measure("accuracy", right),
        Measure("macro_f1", counts.reshape(len(labels), -1), _macro_f1),
        Measure("calibration_error", bins.reshape(len(labels), -1), _calibration_error, higher_is_better=False),
        mean_measure("loss", predictions.loss, higher_is_better=False),
    )
    return {measure.name: measure for measure in measures}


def class_analysis(labels: Labels, classes: Sequence[str], predictions: Mapping[str, Predictions]) -> dict[str, Any]:
    """The part `classes` of a validation and of the report, for JSON; lists are in the order of `classes`.

    labels:    the classes' names, and without_examples: those of them that no example has
    support:   examples of each class
    precision, recall, f1: by model, of each class; None where the class has no examples, and precision is 0 for a class
               that has some, but is never predicted
    confusion: by model, row: the right class, column: the predicted one
    reliability: by model, the bins that hold examples: {"from", "to", "count", "confidence", "accuracy"}
    """
    number = len(classes)
    support = np.bincount(labels, minlength=number)
    analysis: dict[str, Any] = {
        "labels": list(classes),
        "support": support.tolist(),
        "without_examples": [name for name, count in zip(classes, support, strict=True) if not count],
        **{name: {} for name in ("precision", "recall", "f1", "confusion", "reliability")},
    }
    for model, found in predictions.items():
        confusion = np.bincount(labels * number + found.classes, minlength=number**2).reshape(number, number)
        right, predicted = confusion.diagonal(), confusion.sum(axis=0)
        columns = {
            "precision": divide(right, predicted),
            "recall": divide(right, support),
            "f1": divide(2 * right, predicted + support),
        }
        for name, values in columns.items():
            analysis[name][model] = [
                round(value, 6) if count else None for value, count in zip(values.tolist(), support, strict=True)
            ]
        analysis["confusion"][model] = confusion.tolist()
        analysis["reliability"][model] = reliability(found, labels)
    return analysis


def reliability(predictions: Predictions, labels: Labels) -> list[dict[str, float]]:
    """How often the predictions of a confidence are right: the bins `from` < confidence ≤ `to` that hold examples."""
    table, bins, right = [], _bin(predictions.confidence), predictions.classes == labels
    for number in np.unique(bins).tolist():
        inside = bins == number
        table.append(
            {
                "from": round(number / _BINS, 6),
                "to": round((number + 1) / _BINS, 6),
                "count": int(inside.sum()),
                "confidence": round(float(predictions.confidence[inside].mean()), 6),
                "accuracy": round(float(right[inside].mean()), 6),
            }
        )
    return table


def _bin(confidence: Array) -> Labels:
    return np.clip(np.ceil(confidence * _BINS).astype(np.int64) - 1, 0, _BINS - 1)


def _macro_f1(sums: Array) -> Array:
    """(..., 3·C): right, predicted, examples of each class → the mean of 2·right / (predicted + examples)."""
    right, predicted, examples = np.split(sums, 3, axis=-1)
    has_examples = examples > 0
    f1 = np.where(has_examples, divide(2 * right, predicted + examples), 0.0)
    return divide(f1.sum(axis=-1), has_examples.sum(axis=-1))


def _calibration_error(sums: Array) -> Array:
    """(..., 2·bins): confidence − right answers, and examples of each bin."""
    gaps, examples = np.split(sums, 2, axis=-1)
    return divide(np.abs(gaps).sum(axis=-1), examples.sum(axis=-1))
