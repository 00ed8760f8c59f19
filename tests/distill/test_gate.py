"""The gate: what counts as degraded, and the training that goes back, whatever interrupts it."""

import json
import shutil
import signal

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

from transformers import EarlyStoppingCallback, TrainerCallback

from neural_layers.distill.checkpoint import newest_checkpoint
from neural_layers.distill.gate import QualityGate
from neural_layers.distill.validation.measures import mean_measure
from neural_layers.errors import InputError
from tests.distill.gated_runs import EVERY, SPIKED, STEPS, Spike, finish, gated_trainer, spiked_run
from tests.distill.language_runs import start


@pytest.fixture(scope="module")
def spiked(tmp_path_factory):
    """A training whose learning rate is multiplied by 50 in the step after the 10th."""
    folder = tmp_path_factory.mktemp("spiked")
    return folder, spiked_run(folder)


def test_a_planted_degradation_is_found_taken_back_and_recovered_from(spiked) -> None:
    folder, trainer = spiked
    (rollback,) = trainer.rollbacks
    assert (rollback.step, rollback.to) == (12, 8)
    assert rollback.value < 0.95 * rollback.best
    assert rollback.high < 0
    assert rollback.learning_rate_factor == 0.5
    assert trainer.outcome == "finished"
    assert trainer.state.global_step == STEPS
    scores = dict(trainer.validations())
    assert set(scores) == set(range(EVERY, STEPS + 1, EVERY))
    assert max(scores.values()) > rollback.best
    assert {path.name for path in (folder / "validation" / "rollback-1").iterdir()} == {"step-12.json"}
    degraded = json.loads((folder / "validation" / "rollback-1" / "step-12.json").read_text())
    assert np.mean(degraded["right"]) == pytest.approx(rollback.value)
    assert degraded["best"] == 8


def test_the_model_ends_with_the_weights_of_its_best_validation(spiked) -> None:
    folder, trainer = spiked
    scores = dict(trainer.validations())
    found = trainer.validate(trainer.model.eval(), 0)["accuracy"]
    assert found == pytest.approx(max(scores.values()))
    (folder / "validation" / "step-0.json").unlink()


def test_a_finished_training_is_not_taken_for_one_of_more_steps(spiked) -> None:
    folder, _ = spiked
    longer = gated_trainer(folder)
    longer.args.max_steps = STEPS + 4
    with pytest.raises(InputError, match=rf"was of max_steps={STEPS} and has ended; max_steps={STEPS + 4}"):
        longer.run()


def test_after_a_rollback_the_learning_rate_is_half_of_what_it_was(spiked, tmp_path) -> None:
    _, trainer = spiked
    untouched = finish(tmp_path)
    rates, undisturbed = (
        {entry["step"]: entry["learning_rate"] for entry in t.state.log_history if "loss" in entry}
        for t in (trainer, untouched)
    )
    assert untouched.rollbacks == []
    for step, rate in rates.items():
        assert rate == pytest.approx(undisturbed[step] * (1 if step <= 8 else 0.5)), step


def test_the_data_and_the_random_state_of_the_best_step_come_again(tmp_path) -> None:
    seen = {}
    trainer = gated_trainer(tmp_path, Spike(SPIKED, 50.0))
    step = trainer.training_step

    def spy(model, inputs, *args, **kwargs):
        at, branch = trainer.state.global_step, len(trainer.rollbacks)
        seen.setdefault((at, branch), []).append((inputs["index"].tolist(), torch.get_rng_state()))
        return step(model, inputs, *args, **kwargs)

    trainer.training_step = spy
    trainer.run()
    for at in (8, 9, 11):
        for (rows, random), (again, random_again) in zip(seen[at, 0], seen[at, 1], strict=True):
            assert rows == again
            assert torch.equal(random, random_again)


def test_after_as_many_rollbacks_as_patience_the_training_ends_with_the_best(tmp_path) -> None:
    trainer = finish(tmp_path, Spike(SPIKED, 50.0, times=9), gate={"patience": 2})
    assert [(r.step, r.to, r.learning_rate_factor) for r in trainer.rollbacks] == [(12, 8, 0.5), (12, 8, 0.25)]
    assert trainer.outcome == "stopped"
    best = trainer.validate(trainer.model.eval(), 0)["accuracy"]
    assert best == pytest.approx(trainer.rollbacks[0].best)
    # The same folder again: the decision stands, and nothing is trained.
    again = finish(tmp_path, gate={"patience": 2})
    assert again.outcome == "stopped"
    for name, value in trainer.model.state_dict().items():
        assert torch.equal(again.model.state_dict()[name], value), name


def test_patience_of_zero_ends_at_the_first_degradation(tmp_path) -> None:
    trainer = finish(tmp_path, Spike(SPIKED, 50.0), gate={"patience": 0})
    assert trainer.rollbacks == []
    assert trainer.outcome == "stopped"


def measure(values, higher: bool = True):
    return mean_measure("score", np.asarray(values, dtype=float), higher_is_better=higher)


def test_a_fall_counts_from_the_threshold_on_and_only_where_it_is_sure() -> None:
    gate = QualityGate("score", max_drop=0.05)
    best = np.full(200, 0.8)
    assert not gate.is_degraded(gate.compare(measure(best - 0.03), measure(best)))  # sure, but small
    assert gate.is_degraded(gate.compare(measure(best - 0.05), measure(best)))
    noise = np.random.default_rng(0).normal(0, 2, 200)
    unsure = gate.compare(measure(best - 0.05 + noise - noise.mean()), measure(best))
    assert unsure.difference == pytest.approx(-0.05)
    assert not gate.is_degraded(unsure)
    assert not gate.is_degraded(gate.compare(measure(best + 0.3), measure(best)))


def test_where_lower_is_better_a_rise_is_a_degradation() -> None:
    gate = QualityGate("score", max_drop=0.05)
    best = np.full(50, 2.0)
    assert gate.is_degraded(gate.compare(measure(best + 0.2, False), measure(best, False)))
    assert not gate.is_degraded(gate.compare(measure(best - 0.2, False), measure(best, False)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"max_drop": 0.0}, "max_drop=0.0 must lie between 0 and 1"),
        ({"max_drop": float("nan")}, "max_drop=nan"),
        ({"lr_factor": 1.0}, "lr_factor=1.0"),
        ({"confidence": 95}, "confidence=95"),
        ({"min_retention": 1.1}, "min_retention=1.1 must lie in"),
        ({"patience": -1}, "patience=-1"),
        ({"samples": 0}, "samples=0"),
    ],
)
def test_thresholds_out_of_range_are_refused(change, message) -> None:
    with pytest.raises(InputError, match=message):
        QualityGate("bleu", **change)


def test_a_gate_needs_what_it_watches_and_what_it_goes_back_to(tmp_path) -> None:
    trainer = gated_trainer(tmp_path)
    parts = {"model": trainer.model, "feed": trainer.feed, "task": trainer.task, "teacher": trainer.teacher}
    parts |= {"loss": trainer.loss, "gate": trainer.gate}
    trainer.args.save_steps = 3
    with pytest.raises(ValueError, match="eval_steps=4 must be a multiple of save_steps=3"):
        type(trainer)(args=trainer.args, validate=trainer.validate, **parts)
    trainer.args.save_steps = 2
    trainer.args.metric_for_best_model = "loss"
    with pytest.raises(ValueError, match="a gate on 'accuracy' needs validate, and metric_for_best_model='accuracy'"):
        type(trainer)(args=trainer.args, validate=trainer.validate, **parts)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("eval_strategy", "no", "eval_strategy=no: the best is found by steps"),
        ("save_strategy", "epoch", "save_strategy=epoch: the best is found by steps"),
        ("gradient_accumulation_steps", 3, "the feed has accumulate=2, and the arguments say 3"),
        ("per_device_train_batch_size", 3, "the feed has batch_size=8, and the arguments say 3"),
        ("eval_on_start", True, "eval_on_start and save_total_limit are not for this trainer"),
    ],
)
def test_arguments_that_would_turn_it_off_or_break_it_are_refused(name, value, message, tmp_path) -> None:
    trainer = gated_trainer(tmp_path)
    parts = {"model": trainer.model, "feed": trainer.feed, "task": trainer.task, "teacher": trainer.teacher}
    parts |= {"loss": trainer.loss, "gate": trainer.gate, "validate": trainer.validate}
    setattr(trainer.args, name, value)
    with pytest.raises(ValueError, match=message):
        type(trainer)(args=trainer.args, **parts)


def test_a_direction_that_is_not_the_metrics_is_found(tmp_path) -> None:
    trainer = gated_trainer(tmp_path)
    trainer.args.greater_is_better = False
    with pytest.raises(ValueError, match="greater_is_better=False is wrong for accuracy; set it to True"):
        trainer.run()


def test_nothing_is_removed_for_a_best_checkpoint_that_is_broken(tmp_path) -> None:
    class Truncate(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs) -> None:
            if state.global_step == 11:
                weights = tmp_path / "checkpoints" / "checkpoint-8" / "model.safetensors"
                weights.write_bytes(weights.read_bytes()[:100])

    with pytest.raises(InputError, match="checkpoint-8 is missing or broken; nothing was removed"):
        finish(tmp_path, Spike(SPIKED, 50.0), Truncate())
    assert {path.name for path in (tmp_path / "checkpoints").glob("checkpoint-*")} == {"checkpoint-8", "checkpoint-10"}
    for path in (tmp_path / "checkpoints").glob("checkpoint-*/model.safetensors"):
        path.write_bytes(b"")
    with pytest.raises(InputError, match="no checkpoint in .* is complete"):
        finish(tmp_path)


def test_a_folder_with_another_training_is_not_trained_into(spiked, tmp_path) -> None:
    folder, _ = spiked
    shutil.copytree(folder, tmp_path / "run")
    with pytest.raises(ValueError, match="holds checkpoints of an earlier training"):
        gated_trainer(tmp_path / "run").train()


def test_callbacks_go_on_where_they_were(tmp_path) -> None:
    stopping = EarlyStoppingCallback(early_stopping_patience=2)
    trainer = finish(tmp_path, stopping)
    found = newest_checkpoint(tmp_path / "checkpoints")
    state = json.loads((found.folder / "trainer_state.json").read_text())["stateful_callbacks"]
    assert state["EarlyStoppingCallback"]["attributes"] == {
        "early_stopping_patience_counter": stopping.early_stopping_patience_counter
    }
    again = EarlyStoppingCallback(early_stopping_patience=2)
    stopping.early_stopping_patience_counter = 7
    trainer.state.stateful_callbacks["EarlyStoppingCallback"] = stopping.state()
    trainer.callback_handler.callbacks.append(again)
    trainer._load_callback_state()
    assert again.early_stopping_patience_counter == 7


def test_a_norm_that_is_infinite_stays_out_of_the_log(tmp_path) -> None:
    trainer = gated_trainer(tmp_path)
    trainer.log({"loss": 1.0, "grad_norm": float("inf"), "train_loss": 3.0})
    assert trainer.state.log_history == [{"loss": 1.0, "epoch": 0.0, "step": 0}]


def test_the_time_of_what_was_given_up_counts(spiked) -> None:
    folder, trainer = spiked
    best, last = (
        json.loads((folder / "checkpoints" / f"checkpoint-{step}" / "state.json").read_text())["seconds"]
        for step in (trainer.best_step(), STEPS)
    )
    assert trainer.seconds >= last >= best > 0


def test_a_record_that_cannot_be_read_is_refused(spiked, tmp_path) -> None:
    folder, _ = spiked
    shutil.copytree(folder, tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "gate.json").write_text('{"rollbacks": [{"step": 1}]}')
    with pytest.raises(InputError, match="gate.json is no gate's record"):
        finish(tmp_path / "run")


def test_a_run_killed_anywhere_ends_with_the_same_bits(tmp_path) -> None:
    process = start(["-m", "tests.distill.interrupted_runs", str(tmp_path)])
    printed = process.communicate(timeout=240)[0]
    assert process.returncode == 0, printed
    found = json.loads((tmp_path / "found.json").read_text())
    killed, weights = found.pop("undisturbed")
    assert killed == 0
    assert len(found) == 9
    for place, (signal_number, ended) in found.items():
        assert signal_number == signal.SIGKILL, place
        assert ended == weights, place
