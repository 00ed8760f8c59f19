"""Distillation on top of `transformers.Trainer`: a teacher, and a loss of several parts."""

from collections import defaultdict
from typing import Any, Protocol

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from neural_layers.distill.checkpoint import Checkpoint
from neural_layers.distill.gated_trainer import GatedTrainer
from neural_layers.distill.losses import DistillationLoss, Outputs
from neural_layers.distill.tasks import Task
from neural_layers.errors import InputError

_LOSS_FILE = "distillation_loss.safetensors"


class CachedTeacher(Protocol):
    """A teacher's outputs that were computed before."""

    def outputs(self, index: Tensor, labels: Tensor) -> Outputs:
        """Those of the examples with these numbers; the labels say which rows count."""


class DistillationTrainer(GatedTrainer):
    """Trains `model`, a student, towards `teacher` by a `DistillationLoss`.

    task:     the kind of model (`Seq2SeqTask`, `CausalTask`, `ClassificationTask`)
    teacher:  put in evaluation mode, on the student's device, and never trained; a `CachedTeacher`; or None for a loss
              with alpha = 0
    loss:     its parts are logged separately as `kl`, `hard`, `cosine`, `mse`; learned projections inside are trained
              and kept in the checkpoints
    The rest is as in `GatedTrainer`.

    Raises InputError where the vocabularies of teacher and student differ in size; ValueError where the loss needs a
    teacher and none is given, for `label_smoothing_factor` (the loss has its own), and for learned projections with
    several processes, which would not keep them equal.
    """

    def __init__(
        self,
        *,
        task: Task,
        teacher: PreTrainedModel | CachedTeacher | None,
        loss: DistillationLoss,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.task = task
        self._refuse(teacher, loss)
        if isinstance(teacher, nn.Module):
            check_vocabularies(teacher, self.model)
            teacher = teacher.eval().requires_grad_(False).to(self.args.device)
        self.teacher, self.loss = teacher, loss.to(self.args.device)
        self._projections = list(self.loss.parameters())
        self._sums: dict[str, float] = defaultdict(float)
        self._logged_step = self._zeroed_step = -1

    def _refuse(self, teacher: Any, loss: DistillationLoss) -> None:
        if loss.needs_teacher and teacher is None:
            raise ValueError(f"the loss has alpha={loss.alpha} and so needs a teacher; give one, or alpha=0")
        if self.args.label_smoothing_factor:
            raise ValueError(
                f"label_smoothing_factor={self.args.label_smoothing_factor}: give label_smoothing to DistillationLoss"
            )
        if list(loss.parameters()) and self.args.world_size > 1:
            raise ValueError(f"a learned projection cannot be trained by {self.args.world_size} processes; use one")

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        labels = self.task.labels(inputs)
        student = self.task.outputs(model, inputs, self.loss.needs_states)
        total, parts = self.loss(student, labels, self._teacher_outputs(inputs, labels), num_items_in_batch)
        # The labels are counted over all processes, and DDP then averages the gradients over them.
        is_shared = num_items_in_batch is not None and self.args.average_tokens_across_devices
        scale = self.accelerator.num_processes if is_shared else 1
        for name, part in parts.items():
            self._sums[name] += scale * part.item()
        return (scale * total, student) if return_outputs else scale * total

    @torch.no_grad()
    def _teacher_outputs(self, inputs: dict[str, Any], labels: Tensor) -> Outputs | None:
        if self.teacher is None or not self.loss.needs_teacher:
            return None
        if not isinstance(self.teacher, nn.Module):
            return self.teacher.outputs(inputs["index"], labels)
        with self.accelerator.autocast():
            return self.task.outputs(self.teacher, inputs, self.loss.needs_states)

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        # Trainer zeroes the gradients of the model alone; those of the projections would add up from step to step.
        if self._zeroed_step != self.state.global_step:
            self.loss.zero_grad()
            self._zeroed_step = self.state.global_step
            self.loss.progress = self.state.global_step / self.args.max_steps
        if self._logged_step < 0:
            self._logged_step = self.state.global_step
        return super().training_step(*args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self._sums:
            # The parts of accumulated batches add up to that of a step, as the loss does.
            steps = self.state.global_step - self._logged_step
            sums = torch.tensor(list(self._sums.values()), dtype=torch.float64, device=self.args.device)
            means = (self.accelerator.reduce(sums, "mean") / steps).tolist()
            logs = {**logs, **dict(zip(self._sums, means, strict=True))}
            self._sums.clear()
            self._logged_step = self.state.global_step
        super().log(logs, *args, **kwargs)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if is_new and self._projections:
            optimizer.add_param_group({"params": self._projections, "weight_decay": self.args.weight_decay})
        return optimizer

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        if not self._projections:
            return super()._clip_grad_norm(model)
        return self.accelerator.clip_grad_norm_([*model.parameters(), *self._projections], self.args.max_grad_norm)

    def _reset(self) -> None:
        super()._reset()
        self._sums.clear()
        self._logged_step = self._zeroed_step = -1

    def _own_state(self) -> dict[str, Any]:
        return {**super()._own_state(), "parts": dict(self._sums), "logged_step": self._logged_step}

    def _restore_own(self, own: dict[str, Any]) -> None:
        self._sums.update(own["parts"])
        self._logged_step = own["logged_step"]

    def _tensors(self) -> tuple[dict[str, Tensor] | None, dict[str, Any], dict[str, dict[str, Tensor]]]:
        weights, optimizer, others = super()._tensors()
        if self._projections:
            others = {**others, _LOSS_FILE: _learned(self.loss)}
        return weights, optimizer, others

    def _load_weights(self, checkpoint: Checkpoint) -> None:
        super()._load_weights(checkpoint)
        if self._projections:
            self.loss.load_state_dict(load_file(checkpoint.folder / _LOSS_FILE), strict=False)


def _learned(loss: DistillationLoss) -> dict[str, Tensor]:
    return {name: parameter.detach() for name, parameter in loss.named_parameters()}


def check_vocabularies(teacher: PreTrainedModel, student: PreTrainedModel) -> None:
    """Raise InputError where the two have vocabularies of different sizes."""
    if teacher.config.vocab_size != student.config.vocab_size:
        raise InputError(
            f"the teacher's vocabulary has {teacher.config.vocab_size} tokens and the student's "
            f"{student.config.vocab_size}; distillation needs one tokenizer for both"
        )
