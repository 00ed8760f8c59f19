"""The range test: its curve against NumPy, and a trainer that is afterwards what it was, bit for bit."""

import copy
import math
import random

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")
from transformers import Trainer, TrainingArguments

from neural_layers.distill.learning_rate import LearningRateCurve, find_learning_rate
from neural_layers.distill.learning_rate.curve import exponential_rates, smooth, steepest
from neural_layers.distill.learning_rate.plot import save_curve
from neural_layers.errors import InputError
from neural_layers.models.hybrid import HybridConfig, HybridForSequenceClassification


def plain_trainer(folder, **arguments) -> Trainer:
    """A transformers.Trainer on a tiny classifier with dropout, whose class is the parity of its first token."""
    torch.manual_seed(0)
    config = HybridConfig(
        vocab_size=20,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        mixers=["mamba", "attention"],
        dropout=0.1,
        classifier_pooling="mean",
        num_labels=2,
        pad_token_id=0,
    )
    ids = torch.randint(1, 20, (64, 5))
    data = [{"input_ids": row, "attention_mask": torch.ones(5, dtype=torch.long), "labels": row[0] % 2} for row in ids]
    chosen = {
        "max_steps": 4,
        "per_device_train_batch_size": 8,
        "learning_rate": 1e-3,
        "save_strategy": "no",
        **arguments,
    }
    args = TrainingArguments(
        output_dir=str(folder), report_to="none", disable_tqdm=True, use_cpu=True, logging_steps=1, **chosen
    )
    return Trainer(model=HybridForSequenceClassification(config), args=args, train_dataset=data)


def weights(trainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.model.state_dict().items()}


def same(one, other) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_smoothing_is_the_bias_corrected_average() -> None:
    losses = np.random.default_rng(0).normal(2, 0.5, 30)
    beta = 0.9
    weights = (1 - beta) * beta ** np.arange(30)
    expected = [np.dot(weights[: t + 1], losses[t::-1]) / weights[: t + 1].sum() for t in range(30)]
    np.testing.assert_allclose(smooth(losses.tolist()), expected, rtol=1e-12)
    assert smooth([3.0] * 5) == pytest.approx([3.0] * 5)


def test_the_suggestion_is_the_steepest_descent_of_the_smoothed_curve() -> None:
    rates = exponential_rates(1e-6, 1.0, 121)
    assert (rates[0], rates[60], rates[120]) == pytest.approx((1e-6, 1e-3, 1.0))
    # A sigmoid falls steepest at its middle; what comes after the lowest point counts no more.
    falling = [2 - 1 / (1 + math.exp(-3 * math.log(rate / 1e-3))) for rate in rates]
    assert steepest(rates, falling) == pytest.approx(1e-3)
    rising_again = [*falling[:100], *[5.0] * 10, *[1.5] * 11]
    assert steepest(rates, rising_again) == pytest.approx(1e-3)
    assert steepest(rates, sorted(falling)) is None


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_fresh_trainer_trains_afterwards_as_if_nothing_had_been(tmp_path, accumulate) -> None:
    first = plain_trainer(tmp_path / "a", gradient_accumulation_steps=accumulate)
    first.train()
    second = plain_trainer(tmp_path / "b", gradient_accumulation_steps=accumulate)
    before, drawn = weights(second), (random.getstate(), torch.get_rng_state().clone())
    curve = find_learning_rate(second, low=1e-4, high=1e-1, steps=12)
    assert len(curve.rates) >= 3
    assert same(before, weights(second))
    assert second.optimizer is None
    assert random.getstate() == drawn[0]
    assert torch.equal(torch.get_rng_state(), drawn[1])
    assert second.state.global_step == 0
    second.train()
    assert same(weights(first), weights(second))
    assert [e.get("loss") for e in first.state.log_history] == [e.get("loss") for e in second.state.log_history]


def test_a_trained_trainer_keeps_its_optimiser_schedule_and_state(tmp_path) -> None:
    trainer = plain_trainer(tmp_path)
    trainer.train()
    kept = copy.deepcopy((trainer.optimizer.state_dict(), trainer.lr_scheduler.state_dict(), trainer.state))
    before, modes = weights(trainer), [module.training for module in trainer.model.modules()]
    find_learning_rate(trainer, low=1e-5, high=1e-1, steps=10)
    assert same(before, weights(trainer))
    assert [module.training for module in trainer.model.modules()] == modes
    now = trainer.optimizer.state_dict()
    assert now["param_groups"] == kept[0]["param_groups"]
    for number, state in kept[0]["state"].items():
        assert same(state, now["state"][number])
    assert trainer.lr_scheduler.state_dict() == kept[1]
    assert trainer.state == kept[2]


def test_the_test_really_trains_and_stops_where_the_loss_explodes(tmp_path, monkeypatch) -> None:
    trainer = plain_trainer(tmp_path)
    seen = []
    original = Trainer.compute_loss

    def watched(self, model, inputs, *args, **kwargs):
        seen.append(model.classifier.out_proj.weight.detach().clone())
        return original(self, model, inputs, *args, **kwargs)

    monkeypatch.setattr(Trainer, "compute_loss", watched)
    curve = find_learning_rate(trainer, low=1e-3, high=1e4, steps=40)
    assert not torch.equal(seen[0], seen[5])
    assert curve.diverged
    assert len(curve.rates) < 40
    assert curve.smoothed[-1] > 4 * min(curve.smoothed)
    assert all(
        r2 / r1 == pytest.approx((1e7) ** (1 / 39)) for r1, r2 in zip(curve.rates, curve.rates[1:], strict=False)
    )


def test_a_step_that_breaks_leaves_the_trainer_as_it_was(tmp_path, monkeypatch) -> None:
    trainer = plain_trainer(tmp_path)
    before = weights(trainer)
    calls = []

    def broken(*args, **kwargs):
        calls.append(1)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return Trainer.compute_loss(trainer, *args, **kwargs)

    monkeypatch.setattr(trainer, "compute_loss", broken)
    with pytest.raises(KeyboardInterrupt):
        find_learning_rate(trainer, low=1e-2, high=1.0, steps=10)
    assert len(calls) == 4
    assert same(before, weights(trainer))


def test_the_plot_is_written_as_png_and_svg(tmp_path) -> None:
    rates = exponential_rates(1e-5, 1.0, 40)
    curve = LearningRateCurve.of(rates, [2 - 1 / (1 + (1e-2 / rate) ** 2) for rate in rates])
    assert save_curve(curve, tmp_path / "deep" / "curve.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in save_curve(curve, tmp_path / "curve.svg").read_text()
    flat = LearningRateCurve.of(rates[:3], [1.0, 1.0, 1.0])
    assert flat.suggestion is None
    save_curve(flat, tmp_path / "flat.svg")
    assert not list(tmp_path.rglob("*.part"))
    with pytest.raises(InputError, match=r"\.png or \.svg"):
        save_curve(curve, tmp_path / "curve.gif")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"low": 1.0, "high": 0.1}, "low < high"),
        ({"low": 0.0}, "above 0"),
        ({"high": math.inf}, "must grow"),
        ({"steps": 2}, "at least 10"),
    ],
)
def test_wrong_arguments_are_named(tmp_path, arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        find_learning_rate(plain_trainer(tmp_path), **arguments)
