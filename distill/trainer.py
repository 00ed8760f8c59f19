"""Training with validation of our own, and distillation on top of it."""

import math
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer

from neural_layers.distill.losses import DistillationLoss
from neural_layers.distill.run_folder import save_tensors
from neural_layers.errors import InputError

Validate = Callable[[nn.Module, int], dict[str, float]]
_LOSS_FILE = "distillation_loss.safetensors"


class ValidatedTrainer(Trainer):
    """A `transformers.Trainer` whose evaluation is `validate(model, step) → metrics`, instead of a loop over a dataset.

    The metrics appear as `eval_<name>` to logs, callbacks and `metric_for_best_model`.
    Raises FloatingPointError where a step's loss is NaN or infinite, naming the step: the last checkpoint stays good.
    """

    model: PreTrainedModel

    def __init__(self, *, validate: Validate, **kwargs: Any) -> None:
        # Trainer refuses an evaluation strategy without a dataset, although this one never reads it.
        super().__init__(**{"eval_dataset": kwargs["train_dataset"], **kwargs})
        self.validate = validate

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        was_training = self.model.training
        self.model.eval()
        metrics = {f"eval_{k}": v for k, v in self.validate(self.model, self.state.global_step).items()}
        self.model.train(was_training)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        if not math.isfinite(loss.item()):
            raise FloatingPointError(
                f"the loss is {loss.item()} at step {self.state.global_step + 1}; lower the learning rate"
            )
        return loss


class DistillationTrainer(ValidatedTrainer):
    """Trains `model`, the student, towards `teacher` by a `DistillationLoss`.

    teacher: put in evaluation mode, on the student's device, and never trained; None for a loss with alpha = 0.
    loss:    its parts are logged separately as `kl`, `hard`, `cosine`, `mse`; a learned projection inside is trained
             and kept in the checkpoints
    All else is as in `transformers.Trainer`, with `validate` as in `ValidatedTrainer`.
    Raises InputError where the vocabularies of teacher and student differ in size, ValueError where the loss needs a
    teacher and none is given.
    """

    def __init__(
        self, *, teacher: PreTrainedModel | None, loss: DistillationLoss, validate: Validate, **kwargs: Any
    ) -> None:
        super().__init__(validate=validate, **kwargs)
        if loss.needs_teacher and teacher is None:
            raise ValueError(f"the loss has alpha={loss.alpha} and so needs a teacher; give one, or alpha=0")
        if teacher is not None:
            check_vocabularies(teacher, self.model)
            teacher = teacher.eval().requires_grad_(False).to(self.args.device)
        self.teacher, self.loss = teacher, loss.to(self.args.device)
        # So that Trainer counts the labels of all accumulated batches, by which the loss is then divided.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        self._sums: dict[str, float] = defaultdict(float)
        self._summed = 0

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        wanted = {"output_hidden_states": self.loss.needs_hidden_states}
        student, teacher = model(**inputs, **wanted), None
        if self.teacher is not None and self.loss.needs_teacher:
            with torch.no_grad(), self.accelerator.autocast():
                teacher = self.teacher(**inputs, **wanted)
        total, parts = self.loss(
            student.logits,
            inputs["labels"],
            None if teacher is None else teacher.logits,
            _last_hidden(student),
            _last_hidden(teacher),
            num_items_in_batch,
        )
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            total = total * self.accelerator.num_processes
        for name, part in parts.items():
            self._sums[name] += part.item()
        self._summed += 1
        return (total, student) if return_outputs else total

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self._summed:
            # The parts of accumulated batches add up to that of a step, as the loss does.
            steps = self._summed / self.args.gradient_accumulation_steps
            logs = {**logs, **{name: value / steps for name, value in self._sums.items()}}
            self._sums.clear()
            self._summed = 0
        super().log(logs, *args, **kwargs)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        projection = list(self.loss.parameters())
        if is_new and projection:
            optimizer.add_param_group({"params": projection, "weight_decay": self.args.weight_decay})
            # Trainer zeroes the gradients of the model alone; those of the projection would add up from step to step.
            optimizer.register_step_post_hook(lambda *_: self.loss.zero_grad())
        return optimizer

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if list(self.loss.parameters()):
            folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
            save_tensors(folder / _LOSS_FILE, self.loss.state_dict())

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if list(self.loss.parameters()):
            self.loss.load_state_dict(load_file(Path(resume_from_checkpoint) / _LOSS_FILE))


def check_vocabularies(teacher: PreTrainedModel, student: PreTrainedModel) -> None:
    """Raise InputError where the two have vocabularies of different sizes."""
    if teacher.config.vocab_size != student.config.vocab_size:
        raise InputError(
            f"the teacher's vocabulary has {teacher.config.vocab_size} tokens and the student's "
            f"{student.config.vocab_size}; distillation needs one tokenizer for both"
        )


def _last_hidden(output: Any) -> Tensor | None:
    states = None if output is None else output.get("decoder_hidden_states", output.get("hidden_states"))
    return None if states is None else states[-1]
