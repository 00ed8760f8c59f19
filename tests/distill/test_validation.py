"""Translating and scoring, on a model too small to be right."""

import json

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

from neural_layers.distill.data.pairs import SentencePair
from neural_layers.distill.data.tokenizer import train_tokenizer
from neural_layers.distill.validation import TranslationOptions, TranslationValidator, translate, translation_quality
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


def test_validator_keeps_each_validation_and_scores_the_teacher_once(model, tokenizer, tmp_path, monkeypatch) -> None:
    import neural_layers.distill.validation.translation as module

    calls, right = [], module.translate
    monkeypatch.setattr(module, "translate", lambda *args, **kwargs: (calls.append(args[0]), right(*args, **kwargs))[1])
    teacher = CVMForConditionalGeneration(model.config).eval()
    validate = TranslationValidator(PAIRS, tokenizer, tmp_path, teacher=teacher, options=TranslationOptions(worst=2))
    for step in (5, 10):
        scores = validate(model, step)
        record = json.loads((tmp_path / f"step-{step}.json").read_text())
        assert record["step"] == step
        assert record["model"] == scores
        assert len(record["worst"]) == 2
        assert set(record["teacher"]) == set(scores)
    assert [point["step"] for point in validate.history] == [5, 10]
    assert calls.count(teacher) == 1
    assert calls.count(model) == 2
