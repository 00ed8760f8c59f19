"""Classification scores against plain loops, and the validator on a small model."""

import json
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from neural_layers.distill.validation import ClassificationOptions, ClassificationValidator
from neural_layers.distill.validation.bootstrap import paired_bootstrap
from neural_layers.distill.validation.class_scores import Predictions, class_analysis, class_measures
from neural_layers.errors import InputError


def _scores_in_loops(logits, labels) -> dict[str, float]:
    number = len(logits[0])
    confusion = [[0] * number for _ in range(number)]
    bins, loss = {}, 0.0
    for row, label in zip(logits, labels, strict=True):
        powers = [math.exp(value) for value in row]
        probabilities = [power / sum(powers) for power in powers]
        chosen = probabilities.index(max(probabilities))
        confusion[label][chosen] += 1
        loss -= math.log(probabilities[label])
        for b in range(15):
            if b / 15 < probabilities[chosen] <= (b + 1) / 15:
                bins.setdefault(b, []).append((probabilities[chosen], chosen == label))
    f1 = []
    for c in range(number):
        support, predicted = sum(confusion[c]), sum(confusion[r][c] for r in range(number))
        if support:
            f1.append(2 * confusion[c][c] / (support + predicted))
    error = sum(len(b) * abs(np.mean([c for c, _ in b]) - np.mean([r for _, r in b])) for b in bins.values())
    return {
        "accuracy": sum(confusion[c][c] for c in range(number)) / len(labels),
        "macro_f1": sum(f1) / len(f1),
        "calibration_error": error / len(labels),
        "loss": loss / len(labels),
    }


def _draw(seed: int, examples: int, classes: int) -> tuple[np.ndarray, np.ndarray]:
    generator = np.random.default_rng(seed)
    logits = 2 * generator.normal(size=(examples, classes))
    # The last class often has no example, and is predicted all the same.
    return logits, generator.integers(max(1, classes - 1), size=examples)


@given(st.integers(1, 30), st.integers(1, 5), st.integers(0, 2**32))
@settings(max_examples=60, derandomize=True, deadline=None, database=None)
def test_scores_are_those_of_plain_loops(examples: int, classes: int, seed: int) -> None:
    logits, labels = _draw(seed, examples, classes)
    found = class_measures(Predictions.of(logits, labels), labels, classes)
    expected = _scores_in_loops(logits.tolist(), labels.tolist())
    assert {name: measure.value for name, measure in found.items()} == pytest.approx(expected, abs=1e-5)
    assert [name for name, measure in found.items() if not measure.higher_is_better] == ["calibration_error", "loss"]


def test_scores_of_a_sample_are_the_scores_of_its_examples() -> None:
    logits, labels = _draw(0, 40, 4)
    rows = np.random.default_rng(1).integers(40, size=40)
    whole = class_measures(Predictions.of(logits, labels), labels, 4)
    sample = class_measures(Predictions.of(logits[rows], labels[rows]), labels[rows], 4)
    for name, measure in whole.items():
        assert measure.score(measure.statistics[rows].sum(axis=0)) == pytest.approx(sample[name].value)


def test_each_class_and_the_reliability_table() -> None:
    logits = np.log([[0.98, 0.01, 0.01], [0.6, 0.3, 0.1], [0.2, 0.7, 0.1], [0.65, 0.25, 0.1]])
    labels = np.array([0, 0, 1, 1])
    found = class_analysis(labels, ["a", "b", "c"], {"student": Predictions.of(logits, labels)})
    assert found["support"] == [2, 2, 0]
    assert found["without_examples"] == ["c"]
    assert found["confusion"]["student"] == [[2, 0, 0], [1, 1, 0], [0, 0, 0]]
    assert found["precision"]["student"] == [pytest.approx(2 / 3, abs=1e-6), 1.0, None]
    assert found["recall"]["student"] == [1.0, 0.5, None]
    assert found["f1"]["student"] == [0.8, pytest.approx(2 / 3, abs=1e-6), None]
    table = found["reliability"]["student"]
    assert [(row["count"], row["confidence"], row["accuracy"]) for row in table] == [
        (1, 0.6, 1.0),
        (1, 0.65, 0.0),
        (1, 0.7, 1.0),
        (1, 0.98, 1.0),
    ]
    assert [(round(15 * row["from"]), round(15 * row["to"])) for row in table] == [(8, 9), (9, 10), (10, 11), (14, 15)]
    json.dumps(found, allow_nan=False)


def test_a_perfect_and_a_hopeless_classifier() -> None:
    labels = np.array([0, 1, 2, 1])
    right = class_measures(Predictions.of(50 * np.eye(3)[labels], labels), labels, 3)
    assert {name: measure.value for name, measure in right.items()} == pytest.approx(
        {"accuracy": 1.0, "macro_f1": 1.0, "calibration_error": 0.0, "loss": 0.0}
    )
    wrong = class_measures(Predictions.of(50 * np.eye(3)[(labels + 1) % 3], labels), labels, 3)
    assert {name: measure.value for name, measure in wrong.items()} == pytest.approx(
        {"accuracy": 0.0, "macro_f1": 0.0, "calibration_error": 1.0, "loss": 50.0}
    )


def test_logits_that_are_no_numbers_and_labels_of_no_class_are_refused() -> None:
    logits = np.zeros((2, 3))
    logits[1, 2] = np.nan
    with pytest.raises(InputError, match=r"logits of example 1 are \[0.0, 0.0, nan\]; lower the learning rate"):
        Predictions.of(logits, np.array([0, 1]))
    with pytest.raises(ValueError, match="labels 0 to 3 for a model of 3 classes"):
        Predictions.of(np.zeros((2, 3)), np.array([0, 3]))
    with pytest.raises(ValueError, match="2 predictions for 3 labels"):
        class_measures(Predictions.of(np.zeros((2, 3)), np.array([0, 1])), np.array([0, 1, 2]), 3)


class BagOfTokens(nn.Module):
    """The sum of a table's rows; what stands behind a mask does not count."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.table = nn.Parameter(torch.randn(20, 3))
        self.calls = 0

    def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor):
        assert not self.training
        self.calls += 1
        logits = (self.table[input_ids] * attention_mask[..., None]).sum(dim=1)
        return type("Output", (), {"logits": logits})


def _collate(examples):
    length = max(len(example["input_ids"]) for example in examples)
    padded = torch.tensor(
        [[*example["input_ids"], *[7] * (length - len(example["input_ids"]))] for example in examples]
    )
    mask = torch.tensor([[i < len(example["input_ids"]) for i in range(length)] for example in examples])
    labels = torch.tensor([example["label"] for example in examples])
    return {"input_ids": padded, "attention_mask": mask.long(), "labels": labels, "index": labels}


def _examples(seed: int = 0) -> list[dict]:
    generator = np.random.default_rng(seed)
    return [
        {"input_ids": generator.integers(20, size=generator.integers(1, 9)).tolist(), "label": int(label)}
        for label in generator.integers(3, size=17)
    ]


def _validator(folder, examples=None, **options) -> ClassificationValidator:
    examples = _examples() if examples is None else examples
    return ClassificationValidator(examples, _collate, folder, classes=["a", "b", "c"], batch_size=4, **options)


def test_a_validation_is_kept_and_compared(tmp_path) -> None:
    texts, teacher = [f"text {i}" for i in range(17)], BagOfTokens(1)
    validate = _validator(tmp_path, teacher=teacher, texts=texts, options=ClassificationOptions(worst=3))
    first, second = BagOfTokens(2).train(), BagOfTokens(3)
    scores = validate(first, 10)
    assert first.training
    alone = [
        first.eval()(**{k: v for k, v in _collate([e]).items() if k not in ("labels", "index")}) for e in _examples()
    ]
    logits = torch.cat([output.logits for output in alone]).detach()
    labels = [example["label"] for example in _examples()]
    assert scores == pytest.approx(_scores_in_loops(logits.tolist(), labels), abs=1e-5)
    record = json.loads((tmp_path / "step-10.json").read_text())
    assert record["model"] == scores
    assert record["compared"] == {"previous": None, "best": None}
    assert record["predictions"] == logits.argmax(dim=1).tolist()
    kept = scores["accuracy"] / record["teacher"]["accuracy"]
    assert record["retention"]["accuracy"] == pytest.approx(kept, abs=1e-5)
    assert len(record["retention_interval"]["macro_f1"]) == 2
    probabilities = logits.double().softmax(dim=1)
    wrong = [i for i in range(17) if record["predictions"][i] != labels[i]]
    sure = sorted(wrong, key=lambda i: -probabilities[i].max())[:3]
    assert [row["text"] for row in record["worst"]] == [texts[i] for i in sure]
    assert record["worst"][0] == {
        "text": texts[sure[0]],
        "label": "abc"[labels[sure[0]]],
        "student": "abc"[record["predictions"][sure[0]]],
        "teacher": record["worst"][0]["teacher"],
        "confidence": pytest.approx(float(probabilities[sure[0]].max()), abs=1e-6),
    }
    earlier = validate.measures
    validate.set_best(10)
    validate(second, 20)
    compared = json.loads((tmp_path / "step-20.json").read_text())["compared"]
    expected = paired_bootstrap(validate.measures["accuracy"], earlier["accuracy"]).as_dict()
    for name in ("previous", "best"):
        assert compared[name]["step"] == 10
        assert compared[name]["accuracy"] == pytest.approx(expected, abs=1e-6)
    assert [point["step"] for point in validate.history] == [10, 20]


def test_a_run_taken_up_again_has_the_same_measures_and_asks_the_teacher_no_more(tmp_path) -> None:
    teacher = BagOfTokens(1)
    validate = _validator(tmp_path, teacher=teacher)
    validate(BagOfTokens(2), 10)
    validate(BagOfTokens(3), 20)
    record, asked = (tmp_path / "step-20.json").read_text(), teacher.calls
    again = _validator(tmp_path, teacher=teacher)
    for name, measure in again.load(10).items():
        assert np.array_equal(measure.statistics, validate.load(10)[name].statistics)
    again(BagOfTokens(3), 20)
    assert (tmp_path / "step-20.json").read_text() == record
    assert teacher.calls == asked
    # Another teacher is asked.
    other = BagOfTokens(4)
    _validator(tmp_path, teacher=other)(BagOfTokens(3), 20)
    assert other.calls > 0
    assert (tmp_path / "step-20.json").read_text() != record


def test_a_file_of_other_examples_or_a_broken_one_is_refused(tmp_path) -> None:
    _validator(tmp_path)(BagOfTokens(2), 10)
    other = _validator(tmp_path, _examples(5))
    with pytest.raises(InputError, match=r"step-10.json: a validation on other examples"):
        other.load(10)
    with pytest.raises(InputError, match=r"step-3.json: no such validation; there are those of steps \[10\]"):
        other.load(3)
    (tmp_path / "step-10.json").write_text('{"step": 10')
    with pytest.raises(InputError, match=r"step-10.json: not a validation"):
        other.load(10)


def test_examples_are_needed_and_texts_for_all_of_them(tmp_path) -> None:
    with pytest.raises(ValueError, match="no examples to validate on"):
        _validator(tmp_path, [])
    with pytest.raises(ValueError, match="1 texts for 17 examples"):
        _validator(tmp_path, texts=["one"])
