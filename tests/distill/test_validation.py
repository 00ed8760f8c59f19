"""Translating and scoring, on a model too small to be right."""

import json

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

from neural_layers.distill.data.pairs import SentencePair
from neural_layers.distill.data.tokenizer import train_tokenizer
from neural_layers.distill.validation import TranslationOptions, TranslationValidator, translate, translation_quality
from neural_layers.distill.validation.bootstrap import paired_bootstrap
from neural_layers.errors import InputError
from neural_layers.models.cvm import CVMConfig, CVMForConditionalGeneration

PAIRS = [
    SentencePair("a dog", "ein Hund"),
    SentencePair("the old man sees", "der alte Mann sieht"),
    SentencePair("x", "y"),
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(PAIRS, 280)


@pytest.fixture(scope="module")
def model(tokenizer) -> CVMForConditionalGeneration:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CVMConfig(vocab_size=len(tokenizer), max_position_embeddings=24, **sizes)
    model = CVMForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("num_beams", [1, 2])
def test_batches_translate_as_single_sentences_in_the_order_given(model, tokenizer, num_beams) -> None:
    sources = [pair.source for pair in PAIRS]
    together = translate(model, tokenizer, sources, batch_size=2, num_beams=num_beams)
    alone = [translate(model, tokenizer, [source], num_beams=num_beams)[0] for source in sources]
    # Alone, the room for a translation is that of its own source: the shorter text is the beginning of the longer.
    assert all(one.startswith(other[:10]) for one, other in zip(together, alone, strict=True))
    assert len(set(together)) > 1


def test_a_source_over_the_models_length_is_cut_with_a_warning(model, tokenizer) -> None:
    with pytest.warns(UserWarning, match="1 sentences are longer than the model's 24 tokens"):
        translate(model, tokenizer, ["x " * 50, "x"])


def test_quality_of_right_and_wrong_translations() -> None:
    references = ["der alte Mann sieht den Hund", "ein Haus steht im Wald"]
    right, wrong = translation_quality(references, references), translation_quality(["", "nein"], references)
    assert (right.bleu, right.chrf, right.ter, right.exact_match) == (100.0, 100.0, 0.0, 1.0)
    assert wrong.bleu < 1
    assert wrong.ter == 100.0
    assert wrong.exact_match == 0.0


def test_quality_needs_a_reference_for_each_hypothesis() -> None:
    with pytest.raises(ValueError, match="1 hypotheses for 2 references"):
        translation_quality(["a"], ["a", "b"])
    with pytest.raises(ValueError, match="0 hypotheses for 0 references"):
        translation_quality([], [])


def test_validator_keeps_each_validation_and_compares_it(model, tokenizer, tmp_path, monkeypatch) -> None:
    import neural_layers.distill.validation.translation as module

    other = CVMForConditionalGeneration(model.config).eval()
    says = {model: ["ein Hund", "der Mann sieht", ""], other: ["", "der Hund", "z"]}
    monkeypatch.setattr(module, "translate", lambda model, *args, **kwargs: says[model])
    validate = TranslationValidator(PAIRS, tokenizer, tmp_path, teacher=model, options=TranslationOptions(worst=2))
    references = [pair.target for pair in PAIRS]
    earlier = {}
    for step in (5, 10):
        scores = validate(other if step == 5 else model, step)
        record = json.loads((tmp_path / f"step-{step}.json").read_text())
        assert record["step"] == step
        assert record["model"] == scores == translation_quality(record["translations"], references).as_dict()
        assert set(record["teacher"]) == set(scores)
        assert set(record["retention"]) == {"bleu", "chrf"}
        assert record["bertscore"] == "left out: no encoder folder was given (--bertscore DIR)"
        assert "seconds" not in record
        assert len(record["worst"]) == 2
        assert record["worst"][0]["student_chrf"] <= record["worst"][1]["student_chrf"]
        assert set(record["worst"][0]) == {
            "source", "reference", "student", "teacher", "student_chrf", "teacher_chrf",
        }  # fmt: skip
        earlier[step] = validate.measures
    # The second model was the teacher itself.
    assert record["model"] == record["teacher"]
    assert record["retention"]["chrf"] == 1.0
    assert record["retention_interval"]["chrf"] == [1.0, 1.0]
    assert record["compared"]["best"] is None
    expected = paired_bootstrap(earlier[10]["chrf"], earlier[5]["chrf"]).as_dict()
    assert record["compared"]["previous"]["step"] == 5
    assert record["compared"]["previous"]["chrf"] == pytest.approx(expected, abs=1e-6)
    assert [point["step"] for point in validate.history] == [5, 10]
    assert validate.history[1]["chrf"] == scores["chrf"]


def test_a_run_taken_up_again_writes_the_same_file_without_asking_the_teacher(
    model, tokenizer, tmp_path, monkeypatch
) -> None:
    import neural_layers.distill.validation.translation as module

    asked, right = [], module.translate
    monkeypatch.setattr(module, "translate", lambda *args, **kwargs: (asked.append(args[0]), right(*args, **kwargs))[1])
    teacher = CVMForConditionalGeneration(model.config).eval()
    validate = TranslationValidator(PAIRS, tokenizer, tmp_path, teacher=teacher)
    validate(teacher, 5)
    validate.set_best(5)
    validate(model, 10)
    record = (tmp_path / "step-10.json").read_text()
    assert len(asked) == 3
    again = TranslationValidator(PAIRS, tokenizer, tmp_path, teacher=teacher)
    for name, measure in again.load(5).items():
        assert np.array_equal(measure.statistics, validate.load(5)[name].statistics)
    assert len(asked) == 3
    again.set_best(5)
    again(model, 10)
    assert (tmp_path / "step-10.json").read_text() == record
    assert asked[3:] == [model]
    # Other sentences, or another teacher, and the teacher is asked again.
    TranslationValidator(PAIRS[:2], tokenizer, tmp_path, teacher=teacher)._teacher(teacher)
    assert asked[4:] == [teacher]
    other = CVMForConditionalGeneration(model.config).eval()
    TranslationValidator(PAIRS[:2], tokenizer, tmp_path, teacher=other)._teacher(other)
    assert asked[5:] == [other]


def test_a_planted_degradation_shows_in_the_comparison_with_the_best(model, tokenizer, tmp_path, monkeypatch) -> None:
    import neural_layers.distill.validation.translation as module

    pairs = [SentencePair(f"the old man sees {i} dogs", f"der alte Mann sieht {i} Hunde") for i in range(40)]
    said = {5: [p.target for p in pairs], 10: [p.target.replace("Mann", "Hund") for p in pairs]}
    monkeypatch.setattr(module, "translate", lambda *args, **kwargs: said[step])
    validate = TranslationValidator(pairs, tokenizer, tmp_path)
    for step in (5, 10):
        validate(model, step)
        validate.set_best(5)
    best = json.loads((tmp_path / "step-10.json").read_text())["compared"]["best"]
    assert best["step"] == 5
    for name in ("bleu", "chrf"):
        assert best[name]["high"] < 0
        assert best[name]["worse"] == 1.0
    assert paired_bootstrap(validate.measures["ter"], validate.load(5)["ter"]).is_worse


def test_bertscores_are_restored_without_the_encoder(model, tokenizer, tmp_path) -> None:
    class Encoder:
        folder, num_layers = tmp_path / "encoder", 2

        def f1(self, hypotheses, references):
            return np.linspace(1 / 3, 70, len(references))

    options = TranslationOptions(encoder=Encoder())
    validate = TranslationValidator(PAIRS, tokenizer, tmp_path, teacher=model, options=options)
    scores = validate(model, 5)
    assert scores["bertscore"] == pytest.approx((1 / 3 + 70) / 2, abs=1e-5)
    record = json.loads((tmp_path / "step-5.json").read_text())
    assert record["bertscore"] == {"encoder": str(tmp_path / "encoder"), "num_layers": 2}
    assert record["teacher"]["bertscore"] == scores["bertscore"]
    restored = TranslationValidator(PAIRS, tokenizer, tmp_path).load(5)["bertscore"]
    assert np.array_equal(restored.statistics, validate.measures["bertscore"].statistics)


def test_validations_of_other_sentences_are_refused(model, tokenizer, tmp_path) -> None:
    TranslationValidator(PAIRS, tokenizer, tmp_path)(model, 5)
    other = TranslationValidator(PAIRS[:2], tokenizer, tmp_path)
    with pytest.raises(InputError, match=r"step-5.json: a validation on other examples"):
        other(model, 10)
    with pytest.raises(InputError, match="no such validation"):
        other.load(7)
    with pytest.raises(ValueError, match="no references"):
        TranslationValidator([], tokenizer, tmp_path)
