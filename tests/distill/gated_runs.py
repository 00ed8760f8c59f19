"""A small training that gets better, with a plant that makes it worse, for tests of the gate."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import TrainerCallback, TrainingArguments

from neural_layers.distill.checkpoint import save_model
from neural_layers.distill.data.feed import ExampleFeed
from neural_layers.distill.files import save_json
from neural_layers.distill.gate import QualityGate
from neural_layers.distill.losses import DistillationLoss, StateAlignment
from neural_layers.distill.tasks import Seq2SeqTask
from neural_layers.distill.trainer import DistillationTrainer
from neural_layers.distill.validation.measures import Measure, mean_measure
from neural_layers.models.cvm import CVMConfig, CVMForConditionalGeneration

VOCABULARY, STEPS, EVERY = 20, 20, 4
SPIKED = 10  # steps done when the learning rate is too high: between the validations at 8 and at 12


def make_model(seed: int, hidden: int, dropout: float = 0.1) -> CVMForConditionalGeneration:
    torch.manual_seed(seed)
    sizes = {"hidden_size": hidden, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return CVMForConditionalGeneration(CVMConfig(vocab_size=VOCABULARY, dropout=dropout, **sizes))


def make_rows(count: int = 64) -> list[dict[str, torch.Tensor]]:
    """Targets in which each token follows from the one before it."""
    generator = torch.Generator().manual_seed(1)
    first = torch.randint(3, VOCABULARY, (count, 1), generator=generator)
    targets = (first - 3 + 5 * torch.arange(6)) % (VOCABULARY - 3) + 3
    return [{"input_ids": t[:4], "attention_mask": torch.ones_like(t[:4]), "labels": t} for t in targets]


def stack(rows: list[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}


class AccuracyValidator:
    """The share of target tokens that are predicted, example by example."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.batch = folder, stack(make_rows(48))
        self.measures: dict[str, Measure] = {}
        self.best: int | None = None

    def set_best(self, step: int | None) -> None:
        self.best = step

    @torch.no_grad()
    def __call__(self, model: Any, step: int) -> dict[str, float]:
        right = (model(**self.batch).logits.argmax(-1) == self.batch["labels"]).double().mean(1).numpy()
        save_json(self.folder / f"step-{step}.json", {"step": step, "right": right.tolist(), "best": self.best})
        self.measures = self._measures(right)
        return {"accuracy": self.measures["accuracy"].value}

    def load(self, step: int) -> dict[str, Measure]:
        return self._measures(np.array(json.loads((self.folder / f"step-{step}.json").read_text())["right"]))

    def _measures(self, right: Any) -> dict[str, Measure]:
        return {"accuracy": mean_measure("accuracy", right)}


class Spike(TrainerCallback):
    """Multiplies the learning rate of one step, as a fault would."""

    def __init__(self, step: int, factor: float, times: int = 1) -> None:
        self.step, self.factor, self.times = step, factor, times

    def on_step_begin(self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any) -> None:
        if state.global_step == self.step and self.times:
            self.times -= 1
            for group in optimizer.param_groups:
                group["lr"] *= self.factor


def gated_trainer(
    folder: Path, *callbacks: TrainerCallback, rank: int = 0, world: int = 1, is_plain: bool = False, **changes: Any
) -> DistillationTrainer:
    """A trainer whose run is in `folder`; dropout, accumulation and a projection make every state matter.

    is_plain: without dropout and projection, so that several processes can be compared with one
    """
    student = make_model(0, 12, 0.0 if is_plain else 0.1)
    saving = {"eval_strategy": "steps", "eval_steps": EVERY, "save_strategy": "steps", "save_steps": EVERY // 2}
    quiet = {"report_to": "none", "disable_tqdm": True, "dataloader_pin_memory": False, "remove_unused_columns": False}
    args = TrainingArguments(
        output_dir=str(folder / "checkpoints"),
        max_steps=STEPS,
        per_device_train_batch_size=8 // world,
        gradient_accumulation_steps=2,
        learning_rate=8e-2,
        lr_scheduler_type="cosine",
        warmup_steps=2,
        logging_steps=3,
        metric_for_best_model="accuracy",
        greater_is_better=True,
        ignore_data_skip=True,
        logging_nan_inf_filter=False,
        seed=3,
        use_cpu=True,
        ddp_backend="gloo" if world > 1 else None,
        ddp_find_unused_parameters=False,
        **saving,
        **quiet,
    )
    torch.manual_seed(7)
    alignment = StateAlignment(student_dim=12, teacher_dim=16)
    gate = QualityGate("accuracy", **{"samples": 200, **changes.pop("gate", {})})
    return DistillationTrainer(
        model=student,
        args=args,
        feed=ExampleFeed(make_rows(), stack, batch_size=8 // world, accumulate=2, seed=5, rank=rank, world=world),
        task=Seq2SeqTask(student),
        teacher=make_model(1, 16),
        loss=DistillationLoss(alpha=0.1, beta=0.9, **({} if is_plain else {"cosine": 0.5, "states": alignment})),
        validate=AccuracyValidator(folder / "validation"),
        gate=gate,
        callbacks=list(callbacks),
        **changes,
    )


def finish(folder: Path, *callbacks: TrainerCallback, **changes: Any) -> DistillationTrainer:
    """Run, or go on, to the end; keep the weights in `folder`/model."""
    torch.set_num_threads(1)
    trainer = gated_trainer(folder, *callbacks, **changes)
    trainer.run()
    if trainer.is_world_process_zero():
        save_model(folder / "model", trainer.model)
    return trainer


def spiked_run(folder: Path, **changes: Any) -> DistillationTrainer:
    """Run, or go on, with a learning rate 50 times too high in one step before the first rollback."""
    is_rolled_back = (folder / "checkpoints" / "gate.json").is_file()
    return finish(folder, Spike(SPIKED, 50.0, times=0 if is_rolled_back else 1), **changes)
