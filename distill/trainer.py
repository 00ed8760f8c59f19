"""Training with validation of our own, and distillation on top of it."""

import math
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel, Trainer

from neural_layers.distill.data.batches import IGNORED_LABEL
from neural_layers.distill.files import replacing
from neural_layers.distill.losses import DistillationLoss, Outputs
from neural_layers.errors import InputError

Validate = Callable[[nn.Module, int], dict[str, float]]
_LOSS_FILE = "distillation_loss.safetensors"


class ValidatedTrainer(Trainer):
    """A `transformers.Trainer` whose evaluation is `validate(model, step) → metrics`, instead of a loop over a dataset.

    The metrics appear as `eval_<name>` to logs, callbacks and `metric_for_best_model`. With several processes the first
    one validates, and the others wait for its metrics.
    Raises FloatingPointError where a step's loss is NaN or infinite, naming the step: the last checkpoint stays good.
    """

    model: PreTrainedModel

    def __init__(self, *, validate: Validate, **kwargs: Any) -> None:
        # Trainer refuses an evaluation strategy without a dataset, although this one never reads it.
        super().__init__(**{"eval_dataset": kwargs.get("train_dataset"), **kwargs})
        self.validate = validate

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        was_training = self.model.training
        self.model.eval()
        metrics = self.validate(self.model, self.state.global_step) if self.is_world_process_zero() else {}
        self.model.train(was_training)
        (metrics,) = broadcast_object_list([metrics])
        metrics = {f"eval_{name}": value for name, value in metrics.items()}
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
    """Trains `model`, an encoder-decoder student, towards `teacher` by a `DistillationLoss`.

    teacher: put in evaluation mode, on the student's device, and never trained; None for a loss with alpha = 0.
    loss:    its parts are logged separately as `kl`, `hard`, `cosine`, `mse`; a learned projection inside is trained
             and kept in the checkpoints
    The rest is as in `transformers.Trainer`, with `validate` as in `ValidatedTrainer`.
    Raises InputError where the vocabularies of teacher and student differ in size; ValueError where the loss needs a
    teacher and none is given, for a student that is no encoder-decoder, for `label_smoothing_factor` (the loss has its
    own), and for a learned projection with several processes, which would not keep it equal.
    """

    def __init__(
        self, *, teacher: PreTrainedModel | None, loss: DistillationLoss, validate: Validate, **kwargs: Any
    ) -> None:
        super().__init__(validate=validate, **kwargs)
        self._refuse(teacher, loss)
        if teacher is not None:
            check_vocabularies(teacher, self.model)
            teacher = teacher.eval().requires_grad_(False).to(self.args.device)
        self.teacher, self.loss = teacher, loss.to(self.args.device)
        self._projection = list(self.loss.parameters())
        # So that Trainer counts the labels of all accumulated batches, by which the loss is then divided.
        self.model_accepts_loss_kwargs = True
        self.loss_is_scaled_for_ga = True
        self._sums: dict[str, float] = defaultdict(float)
        self._logged_step = self._zeroed_step = -1

    def _refuse(self, teacher: PreTrainedModel | None, loss: DistillationLoss) -> None:
        if loss.needs_teacher and teacher is None:
            raise ValueError(f"the loss has alpha={loss.alpha} and so needs a teacher; give one, or alpha=0")
        if not self.model.config.is_encoder_decoder:
            raise ValueError(f"{type(self.model).__name__} is no encoder-decoder: its labels would have to be shifted")
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
        # Decoder inputs and not labels go to the models: with labels each would also compute a loss of its own.
        labels = inputs["labels"]
        inputs = {name: value for name, value in inputs.items() if name != "labels"}
        student_model: Any = self.model
        inputs["decoder_input_ids"] = student_model.prepare_decoder_input_ids_from_labels(labels)
        wanted = {"output_hidden_states": self.loss.needs_states}
        student, teacher = model(**inputs, **wanted), None
        if self.teacher is not None and self.loss.needs_teacher:
            with torch.no_grad(), self.accelerator.autocast():
                teacher = self.teacher(**inputs, **wanted)
        seen = None if teacher is None else _seen(teacher, labels)
        total, parts = self.loss(_seen(student, labels), labels, seen, num_items_in_batch)
        # The labels are counted over all processes, and DDP then averages the gradients over them.
        is_shared = num_items_in_batch is not None and self.args.average_tokens_across_devices
        scale = self.accelerator.num_processes if is_shared else 1
        for name, part in parts.items():
            self._sums[name] += scale * part.item()
        return (scale * total, student) if return_outputs else scale * total

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        # Trainer zeroes the gradients of the model alone; those of the projection would add up from step to step.
        if self._zeroed_step != self.state.global_step:
            self.loss.zero_grad()
            self._zeroed_step = self.state.global_step
        if self._logged_step < 0:
            self._logged_step = self.state.global_step  # where a resumed run begins
        return super().training_step(*args, **kwargs)

    def log(self, logs: dict[str, float], *args: Any, **kwargs: Any) -> None:
        if "loss" in logs and self._sums:
            # The parts of accumulated batches add up to that of a step, as the loss does.
            steps = self.state.global_step - self._logged_step
            logs = {**logs, **{name: value / steps for name, value in self._sums.items()}}
            self._sums.clear()
            self._logged_step = self.state.global_step
        super().log(logs, *args, **kwargs)

    def create_optimizer(self, *args: Any, **kwargs: Any) -> torch.optim.Optimizer:
        is_new = self.optimizer is None
        optimizer = super().create_optimizer(*args, **kwargs)
        if is_new and self._projection:
            optimizer.add_param_group({"params": self._projection, "weight_decay": self.args.weight_decay})
        return optimizer

    def _clip_grad_norm(self, model: nn.Module) -> Any:
        if not self._projection:
            return super()._clip_grad_norm(model)
        return self.accelerator.clip_grad_norm_([*model.parameters(), *self._projection], self.args.max_grad_norm)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        super()._save_checkpoint(model, trial)
        if self._projection and self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial)) / f"checkpoint-{self.state.global_step}"
            with replacing(folder / _LOSS_FILE) as beside:
                save_file(self.loss.state_dict(), beside)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        super()._load_from_checkpoint(resume_from_checkpoint, model)
        if self._projection:
            self.loss.load_state_dict(load_file(Path(resume_from_checkpoint) / _LOSS_FILE))


def check_vocabularies(teacher: PreTrainedModel, student: PreTrainedModel) -> None:
    """Raise InputError where the two have vocabularies of different sizes."""
    if teacher.config.vocab_size != student.config.vocab_size:
        raise InputError(
            f"the teacher's vocabulary has {teacher.config.vocab_size} tokens and the student's "
            f"{student.config.vocab_size}; distillation needs one tokenizer for both"
        )


def _seen(output: Any, labels: Tensor) -> Outputs:
    """What the loss sees: states of the decoder, where there are any, for the tokens that have a label."""
    states = output.get("decoder_hidden_states", output.get("hidden_states"))
    return Outputs(logits=output.logits, states=states, mask=labels != IGNORED_LABEL)
