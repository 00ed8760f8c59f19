"""A language model's validations, with measures for the bootstrap."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from neural_layers.distill.text.packing import IGNORED
from neural_layers.distill.text.store import TokenStore
from neural_layers.distill.validation.bootstrap import paired_bootstrap
from neural_layers.distill.validation.language import LanguageValidator
from neural_layers.errors import InputError


class Unigram(nn.Module):
    """Predicts every token with a fixed probability."""

    def __init__(self, probabilities: list[float]) -> None:
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(probabilities).log())

    def forward(self, input_ids, labels, skip_logits, **rest):
        kept = labels[:, 1:] != IGNORED
        logits = self.logits.expand(*labels[:, 1:].shape, -1)[kept]
        return SimpleNamespace(loss=nn.functional.cross_entropy(logits, labels[:, 1:][kept]))


def _validator(store: TokenStore, folder) -> LanguageValidator:
    return LanguageValidator(store, context=5, batch=2, vocab_size=4, device=torch.device("cpu"), folder=folder)


@pytest.fixture
def store() -> TokenStore:
    tokens = np.random.default_rng(0).integers(4, size=60).astype(np.uint16)
    return TokenStore(tokens, np.array([0, 25]), 60)


def test_the_measure_is_the_loss_and_can_be_loaded(store, tmp_path) -> None:
    validate, even, skewed = _validator(store, tmp_path), Unigram([0.25] * 4), Unigram([0.7, 0.1, 0.1, 0.1])
    metrics = validate(even, 3)
    assert metrics["loss"] == pytest.approx(np.log(4))
    assert validate.measures["loss"].value == pytest.approx(metrics["loss"])
    # The first token of each document is predicted by nothing.
    assert validate.measures["loss"].statistics[:, 1].sum() == 58
    assert validate(skewed, 6)["loss"] == pytest.approx(validate.measures["loss"].value)
    earlier = _validator(store, tmp_path).load(3)["loss"]
    assert earlier.value == pytest.approx(metrics["loss"])
    comparison = paired_bootstrap(validate.measures["loss"], earlier)
    assert comparison.is_worse
    assert comparison.difference > 0
    assert json.loads((tmp_path / "step-6.json").read_text())["step"] == 6


def test_a_validation_that_is_not_there_or_broken_is_refused(store, tmp_path) -> None:
    validate = _validator(store, tmp_path)
    with pytest.raises(InputError, match=r"step-3.json: no validation to compare with"):
        validate.load(3)
    (tmp_path / "step-3.json").write_text("[]")
    with pytest.raises(InputError, match=r"step-3.json: no validation to compare with"):
        validate.load(3)
    with pytest.raises(ValueError, match="they are kept nowhere"):
        _validator(store, None).load(3)
