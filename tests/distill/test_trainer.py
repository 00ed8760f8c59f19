"""DistillationTrainer: what it adds to transformers' Trainer."""

import copy
import math

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

from transformers import TrainerCallback, TrainingArguments

from neural_layers.distill import tasks
from neural_layers.distill.data.feed import ExampleFeed
from neural_layers.distill.losses import DistillationLoss, Outputs, StateAlignment
from neural_layers.distill.tasks import Seq2SeqTask
from neural_layers.distill.trainer import DistillationTrainer
from neural_layers.errors import InputError
from neural_layers.models.cvm import CVMConfig, CVMForConditionalGeneration


def make_model(seed: int, hidden: int = 8, vocabulary: int = 20) -> CVMForConditionalGeneration:
    torch.manual_seed(seed)
    sizes = {"hidden_size": hidden, "intermediate_size": 12, "num_hidden_layers": 1, "num_attention_heads": 2}
    return CVMForConditionalGeneration(CVMConfig(vocab_size=vocabulary, dropout=0.0, **sizes))


def make_rows(count: int = 8) -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    rows = []
    for i in range(count):
        labels = torch.randint(3, 20, (5,), generator=generator)
        labels[5 - i % 4 :] = -100  # rows that count for unlike amounts
        source = torch.randint(3, 20, (4,), generator=generator)
        rows.append({"input_ids": source, "attention_mask": torch.ones_like(source), "labels": labels})
    return rows


def stack(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


def make_trainer(folder, *, student=None, teacher=None, loss=None, rows=None, **arguments) -> DistillationTrainer:
    defaults = {"max_steps": 2, "per_device_train_batch_size": 4, "logging_steps": 1, "learning_rate": 1e-2}
    defaults |= {"save_strategy": "no", "report_to": "none", "disable_tqdm": True, "dataloader_pin_memory": False}
    defaults |= {"remove_unused_columns": False, "ignore_data_skip": True, "logging_nan_inf_filter": False}
    ours = {name: arguments.pop(name) for name in ("validate", "gate") if name in arguments}
    args = TrainingArguments(output_dir=str(folder), **{**defaults, **arguments})
    student = make_model(0) if student is None else student
    batch, accumulate = args.per_device_train_batch_size, args.gradient_accumulation_steps
    return DistillationTrainer(
        model=student,
        args=args,
        feed=ExampleFeed(make_rows() if rows is None else rows, stack, batch_size=batch, accumulate=accumulate),
        task=Seq2SeqTask(student),
        teacher=make_model(1) if teacher is None else teacher,
        loss=DistillationLoss() if loss is None else loss,
        **ours,
    )


def test_the_teacher_stays_as_it_is(tmp_path) -> None:
    trainer = make_trainer(tmp_path)
    before = copy.deepcopy(trainer.teacher.state_dict())
    trainer.teacher.train()
    trainer = make_trainer(tmp_path, teacher=trainer.teacher)
    trainer.train()
    assert not trainer.teacher.training
    assert all(torch.equal(value, before[name]) for name, value in trainer.teacher.state_dict().items())


def test_accumulated_small_batches_train_as_one_large_batch(tmp_path) -> None:
    students = []
    for batch_size, accumulation in ((8, 1), (2, 4)):
        trainer = make_trainer(
            tmp_path,
            per_device_train_batch_size=batch_size,
            gradient_accumulation_steps=accumulation,
            optim="sgd",
            learning_rate=0.5,
            max_grad_norm=0.0,
        )
        trainer.train()
        students.append((trainer.model.state_dict(), trainer.state.log_history))
    for name, value in students[0][0].items():
        torch.testing.assert_close(students[1][0][name], value, msg=name)
    for key in ("loss", "kl", "hard"):
        assert students[1][1][0][key] == pytest.approx(students[0][1][0][key], rel=1e-4)


def test_loss_and_parts_are_those_of_the_formula(tmp_path) -> None:
    trainer = make_trainer(tmp_path, max_steps=1, per_device_train_batch_size=8)
    student, teacher, rows = copy.deepcopy(trainer.model), trainer.teacher, make_rows()
    trainer.train()
    batch = {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
    ours, theirs = (Outputs(logits=model.double()(**batch).logits) for model in (student, teacher))
    total, parts = DistillationLoss()(ours, batch["labels"], theirs)
    logged = trainer.state.log_history[0]
    assert logged["loss"] == pytest.approx(total.item(), rel=1e-4)
    # T² = 36 times the rounding of logarithms near 3 in float32
    assert {k: logged[k] for k in parts} == pytest.approx({k: v.item() for k, v in parts.items()}, rel=1e-4, abs=1e-5)


def test_projection_is_trained_and_resumed(tmp_path) -> None:
    def build(**arguments) -> DistillationTrainer:
        torch.manual_seed(5)
        loss = DistillationLoss(cosine=0.5, states=StateAlignment(student_dim=8, teacher_dim=12))
        saving = {"save_strategy": "steps", "save_steps": 2, "max_steps": 4}
        return make_trainer(tmp_path, teacher=make_model(1, hidden=12), loss=loss, **{**saving, **arguments})

    whole = build()
    initial = whole.loss.states.projections[0].weight.detach().clone()
    whole.train()
    assert not torch.equal(whole.loss.states.projections[0].weight, initial)
    assert "cosine" in whole.state.log_history[0]
    resumed = build()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert torch.equal(resumed.loss.states.projections[0].weight, whole.loss.states.projections[0].weight)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(resumed.model.state_dict()[name], value), name


def test_a_loss_that_is_not_finite_stops_the_run_and_names_the_step(tmp_path) -> None:
    trainer = make_trainer(tmp_path, max_steps=5)
    right, calls = trainer.loss.forward, []

    def spoiled(*args, **kwargs):
        total, parts = right(*args, **kwargs)
        calls.append(1)
        return (total * math.nan if len(calls) == 3 else total), parts

    trainer.loss.forward = spoiled
    with pytest.raises(FloatingPointError, match="the loss is nan at step 3 .*lower learning rate"):
        trainer.train()


def test_vocabularies_that_differ_are_refused(tmp_path) -> None:
    with pytest.raises(InputError, match="teacher's vocabulary has 30 tokens and the student's 20"):
        make_trainer(tmp_path, teacher=make_model(1, vocabulary=30))


def test_a_loss_that_needs_a_teacher_is_refused_without_one(tmp_path) -> None:
    trainer = make_trainer(tmp_path)
    with pytest.raises(ValueError, match="alpha=0.8 and so needs a teacher"):
        DistillationTrainer(
            model=trainer.model,
            args=trainer.args,
            feed=trainer.feed,
            task=trainer.task,
            teacher=None,
            loss=DistillationLoss(),
        )


def test_projection_is_clipped_together_with_the_model(tmp_path) -> None:
    loss = DistillationLoss(cosine=0.5, states=StateAlignment(student_dim=8, teacher_dim=12))
    trainer = make_trainer(tmp_path, teacher=make_model(1, hidden=12), loss=loss, max_steps=1, max_grad_norm=1e-6)
    norms = []

    class Spy(TrainerCallback):
        def on_pre_optimizer_step(self, *args, **kwargs) -> None:
            parameters = [*trainer.model.parameters(), *loss.parameters()]
            norms.append(torch.stack([p.grad.norm() for p in parameters if p.grad is not None]).norm().item())

    trainer.add_callback(Spy())
    trainer.train()
    assert norms == [pytest.approx(1e-6, rel=1e-2)]


# The step is skipped on purpose, so the scheduler comes first.
@pytest.mark.filterwarnings("ignore:Detected call of `lr_scheduler.step")
def test_gradients_of_a_step_that_was_skipped_do_not_stay_in_the_projection(tmp_path) -> None:
    loss = DistillationLoss(cosine=0.5, states=StateAlignment(student_dim=8, teacher_dim=12))
    trainer = make_trainer(tmp_path, teacher=make_model(1, hidden=12), loss=loss, max_steps=3, max_grad_norm=0.0)
    seen = []

    class Skip(TrainerCallback):
        """As a gradient scaler does after an overflow: the gradients are spoiled and the step does not happen."""

        def on_pre_optimizer_step(self, args, state, control, **kwargs) -> None:
            seen.append(loss.states.projections[0].weight.grad.isfinite().all().item())
            if state.global_step == 0:
                for p in [*trainer.model.parameters(), *loss.parameters()]:
                    p.grad = None if p.grad is None else torch.full_like(p.grad, math.inf)
                step = trainer.optimizer.step
                trainer.optimizer.step = lambda *args: setattr(trainer.optimizer, "step", step)

    trainer.add_callback(Skip())
    trainer.train()
    assert seen == [True, True, True]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"label_smoothing_factor": 0.1}, "label_smoothing_factor=0.1: give label_smoothing to DistillationLoss"),
    ],
)
def test_arguments_that_would_be_ignored_are_refused(change, message, tmp_path) -> None:
    with pytest.raises(ValueError, match=message):
        make_trainer(tmp_path, **change)


def test_a_decoder_only_student_is_refused(tmp_path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    with pytest.raises(ValueError, match="LlamaForCausalLM is no encoder-decoder"):
        make_trainer(tmp_path, student=LlamaForCausalLM(LlamaConfig(vocab_size=20, **sizes)))


def test_both_routes_to_the_loss_train_alike(tmp_path, monkeypatch) -> None:
    """Logits as any transformers model gives them, and the inputs of the last layer as ours do."""
    logged = []
    for skips in (True, False):
        monkeypatch.setattr(tasks, "_can_skip_logits", lambda kind, skips=skips: skips)
        trainer = make_trainer(tmp_path, max_steps=3)
        seen = trainer.task.outputs(trainer.model, stack(make_rows()), with_states=True)
        assert (seen.logits is None) == (seen.hidden is not None) == skips
        assert len(seen.states) == 2
        trainer.train()
        logged.append([record["loss"] for record in trainer.state.log_history if "loss" in record])
    assert logged[0] == pytest.approx(logged[1], rel=1e-5)


def test_scheduled_weights_follow_the_steps(tmp_path) -> None:
    seen = []

    class Spy(TrainerCallback):
        def on_pre_optimizer_step(self, *args, **kwargs) -> None:
            seen.append((trainer.loss.alpha, trainer.loss.temperature))

    trainer = make_trainer(tmp_path, loss=DistillationLoss(alpha="0.8:0.4", temperature="6:2"), max_steps=4)
    trainer.add_callback(Spy())
    trainer.train()
    assert seen == [pytest.approx(pair) for pair in ((0.8, 6.0), (0.7, 5.0), (0.6, 4.0), (0.5, 3.0))]


def test_optimizers_that_a_rollback_would_lose_are_refused(tmp_path) -> None:
    trainer = make_trainer(tmp_path)
    optimizer = torch.optim.SGD(trainer.model.parameters(), lr=0.1)
    with pytest.raises(ValueError, match="optimizers were given"):
        DistillationTrainer(
            model=trainer.model,
            args=trainer.args,
            feed=trainer.feed,
            task=trainer.task,
            teacher=None,
            loss=DistillationLoss(alpha=0.0),
            optimizers=(optimizer, None),
        )
