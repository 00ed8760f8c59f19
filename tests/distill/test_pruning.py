"""Pruning in the course of a training: when, how far, and across an interruption to the same bits."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("transformers", reason="transformers is not installed")

from transformers import Trainer, TrainerCallback, TrainingArguments

from neural_layers.distill.exact_trainer import ExactTrainer
from neural_layers.distill.pruning import PruningCallback
from neural_layers.errors import InputError
from neural_layers.models.hybrid import HybridConfig, HybridForCausalLM
from neural_layers.wrappers.pruning import PruningSchedule, masks, prune

SCHEDULE = PruningSchedule(final=0.6, times=3, every=2, start=1, initial=0.2, recovery=2)


def make_model() -> HybridForCausalLM:
    torch.manual_seed(0)
    sizes = {"vocab_size": 12, "hidden_size": 8, "intermediate_size": 12, "num_hidden_layers": 2, "dropout": 0.1}
    return HybridForCausalLM(HybridConfig(**sizes, mixers=["mamba", "attention"], num_attention_heads=2))


class TokenFeed:
    """Random tokens, a function of the step."""

    def batches(self, step: int):
        while True:
            ids = torch.randint(0, 12, (4, 7), generator=torch.Generator().manual_seed(step))
            yield {"input_ids": ids, "labels": ids}
            step += 1

    def state(self) -> dict:
        return {}

    def restore(self, state: dict) -> None:
        pass


class _Watch(TrainerCallback):
    """The zero share of the pruned weights behind each step."""

    def __init__(self) -> None:
        self.zeros: dict[int, float] = {}

    def on_step_end(self, args, state, control, model=None, **kwargs) -> None:
        weights = [model.get_submodule(name).weight for name in masks(model)]
        held = sum(int((w == 0).sum()) for w in weights)
        self.zeros[state.global_step] = held / max(sum(w.numel() for w in weights), 1)


def arguments(folder, **changes) -> TrainingArguments:
    defaults = {"max_steps": 8, "per_device_train_batch_size": 4, "learning_rate": 1e-2, "save_steps": 3}
    defaults |= {"report_to": "none", "disable_tqdm": True, "dataloader_pin_memory": False, "logging_steps": 1}
    return TrainingArguments(output_dir=str(folder), ignore_data_skip=True, **{**defaults, **changes})


def make_trainer(folder, callback=None, model=None, **changes) -> tuple[ExactTrainer, PruningCallback]:
    callback = PruningCallback(SCHEDULE, scope="global") if callback is None else callback
    model = make_model() if model is None else model
    args = arguments(folder, **changes)
    return ExactTrainer(model=model, args=args, feed=TokenFeed(), validate=None, keep=5, callbacks=[callback]), callback


def test_weights_are_pruned_by_the_schedule_and_stay_zero_between(tmp_path) -> None:
    trainer, callback = make_trainer(tmp_path)
    watch = _Watch()
    trainer.add_callback(watch)
    trainer.train()
    # 0.6 − 0.4 · (1 − i/2)³ = 0.2, 0.55, 0.6, before steps 1, 3 and 5 as counted from 0
    assert list(callback.reports) == [1, 3, 5]
    expected = {2: 0.2, 3: 0.2, 4: 0.55, 5: 0.55, 6: 0.6, 7: 0.6, 8: 0.6}
    assert {step: watch.zeros[step] for step in expected} == pytest.approx(expected, abs=1e-3)
    assert watch.zeros[1] == 0
    logged = {entry["step"]: entry.get("sparsity") for entry in trainer.state.log_history}
    assert logged[1] is None
    assert logged[8] == pytest.approx(0.6, abs=1e-3)
    moved = [not torch.equal(p, q) for p, q in zip(trainer.model.parameters(), make_model().parameters(), strict=True)]
    assert sum(moved) > len(moved) * 0.9


@pytest.mark.parametrize("step", [3, 6])
def test_a_continued_training_ends_with_the_same_bits(step: int, tmp_path) -> None:
    whole, _ = make_trainer(tmp_path)
    whole.train()
    continued, callback = make_trainer(tmp_path)
    continued.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{step}"))
    assert list(callback.reports) == [s for s in (1, 3, 5) if s >= step]
    for name, value in whole.model.state_dict().items():
        assert torch.equal(continued.model.state_dict()[name], value), name
    assert all(torch.equal(mask, masks(continued.model)[name]) for name, mask in masks(whole.model).items())
    saved = json.loads((tmp_path / f"checkpoint-{step}" / "trainer_state.json").read_text())
    places = saved["stateful_callbacks"]["PruningCallback"]["attributes"]["unpruned_zeros"]
    assert sorted(places) == sorted(masks(whole.model))


def test_a_zero_that_is_not_pruned_is_told_from_those_that_are(tmp_path) -> None:
    model = make_model()
    layer = model.model.layers[0].feed_forward.inner.down_proj
    with torch.no_grad():
        layer.weight[0] = 0.0
    prune(model, "random", 0.3, include=["0.feed_forward.inner.down_proj"])
    kept = int((masks(model)["model.layers.0.feed_forward.inner.down_proj"][0]).sum())
    assert kept > 0
    callback = PruningCallback(SCHEDULE)
    callback._model = model
    state = json.loads(json.dumps(callback.state()))
    again = PruningCallback(**state["args"])
    assert again.schedule == SCHEDULE
    fresh = make_model()
    fresh.load_state_dict(model.state_dict())
    again.unpruned_zeros = state["attributes"]["unpruned_zeros"]
    trainer, _ = make_trainer(tmp_path, again, fresh)
    trainer.state.global_step, trainer.state.max_steps = 1, 8
    again.on_train_begin(trainer.args, trainer.state, trainer.control, model=fresh)
    assert all(torch.equal(mask, masks(fresh)[name]) for name, mask in masks(model).items())
    again.unpruned_zeros = {"elsewhere": []}
    with pytest.raises(InputError, match="there is no layer elsewhere"):
        again.on_train_begin(trainer.args, trainer.state, trainer.control, model=fresh)


def test_trainer_of_transformers_prunes_and_continues(tmp_path) -> None:
    data = [{"input_ids": ids, "labels": ids} for ids in torch.randint(0, 12, (32, 7))]

    def build(restores: bool = True) -> Trainer:
        args = arguments(tmp_path, restore_callback_states_from_checkpoint=restores, gradient_accumulation_steps=2)
        callback = PruningCallback(SCHEDULE, "ln_structured", exclude=["x_proj"])
        return Trainer(model=make_model(), args=args, train_dataset=data, callbacks=[callback])

    whole = build()
    whole.train()
    pruned = masks(whole.model)
    assert sum(int((~mask).sum()) for mask in pruned.values()) / sum(m.numel() for m in pruned.values()) > 0.5
    continued = build()
    continued.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert all(torch.equal(mask, masks(continued.model)[name]) for name, mask in pruned.items())
    with pytest.raises(ValueError, match="set restore_callback_states_from_checkpoint=True"):
        build(restores=False).train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))


def test_a_pruned_model_that_is_loaded_goes_on_as_one(tmp_path) -> None:
    model = make_model()
    prune(model, "l1", 0.3)
    model.save_pretrained(tmp_path / "pruned")
    loaded = HybridForCausalLM.from_pretrained(tmp_path / "pruned")
    trainer, callback = make_trainer(tmp_path, PruningCallback(PruningSchedule(0.5, 1, 1, start=2)), loaded)
    trainer.train()
    assert callback.reports[2].sparsity == pytest.approx(0.5, abs=0.01)
    before = masks(model)
    assert all(not (mask & ~before[name]).any() for name, mask in masks(loaded).items())


@given(
    final=st.floats(0.0, 0.99), times=st.integers(1, 9), every=st.integers(1, 5), start=st.integers(0, 4),
    shape=st.sampled_from(["cubic", "linear"]),
)  # fmt: skip
def test_a_schedule_rises_to_its_end(final: float, times: int, every: int, start: int, shape: str) -> None:
    schedule = PruningSchedule(final, times, every, start, shape=shape)
    found = [schedule.amount(step) for step in range(schedule.steps + 2 * every)]
    told = [amount for amount in found if amount is not None]
    assert len(told) == times
    assert told == sorted(told)
    assert told[-1] == final
    assert found[schedule.last] == final
    if times > 2:
        middle = told[1] / final if final else 1.0
        share = 1 / (times - 1)
        expected = share if shape == "linear" else 1 - (1 - share) ** 3
        assert middle == pytest.approx(expected if final else 1.0)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"final": 1.0}, r"final=1.0 must be a number in \[0, 1\)"),
        ({"initial": 0.7}, "initial=0.7 must not be more than final=0.5"),
        ({"times": 0}, "times=0 must be an integer of at least 1"),
        ({"start": -1}, "start=-1 must be"),
        ({"recovery": 0}, "recovery=0 must be"),
        ({"shape": "steps"}, "shape='steps' must be one of cubic, linear"),
    ],
)
def test_a_wrong_schedule_is_told(changes: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PruningSchedule(**{"final": 0.5, "times": 2, "every": 2, **changes})


def test_what_pruning_does_not_go_with_is_told_before_a_step(tmp_path) -> None:
    with pytest.raises(ValueError, match="amount=0.5 is the schedule's to say"):
        PruningCallback(SCHEDULE, amount=0.5)
    with pytest.raises(ValueError, match="times=3: method='n:m' prunes a fixed share at once"):
        PruningCallback(SCHEDULE, "n:m")
    trainer, _ = make_trainer(tmp_path, max_steps=6)
    with pytest.raises(ValueError, match="max_steps=6 is less than the 7 steps of the pruning's schedule"):
        trainer.train()
    trainer, _ = make_trainer(tmp_path)
    trainer.keeps_best = True
    with pytest.raises(ValueError, match="the trainer keeps its best checkpoint: that may be one of before"):
        trainer.train()
    assert not masks(trainer.model)
