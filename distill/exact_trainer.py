"""A trainer whose runs can be cut off anywhere: the same batch for the same step, and checkpoints that hold it all."""

import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import IntervalStrategy

from neural_layers.distill.checkpoint import (
    TRAINER_STATE,
    Checkpoint,
    load_weights,
    open_checkpoint,
    random_state,
    read_optimizer,
    remove_old,
    restore_random_state,
    write_checkpoint,
)
from neural_layers.errors import InputError

Validate = Callable[[nn.Module, int], dict[str, float]]


class Feed(Protocol):
    """Training batches, the same ones for the same step however often the run was interrupted."""

    def batches(self, step: int) -> Iterator[dict[str, Tensor]]:
        """The batches of this process from optimiser step `step` (counted from 0) on, without end."""

    def state(self) -> dict[str, Any]:
        """What `restore` needs besides the step; JSON."""

    def restore(self, state: dict[str, Any]) -> None:
        """Continue behind the last batch that was given out when `state` was called."""


class ExactTrainer(Trainer):
    """A `transformers.Trainer` with batches from a feed, validation of our own, and checkpoints without pickles.

    feed:     gives the batches, instead of a dataset
    validate: `validate(model, step) → metrics`; None for none. They appear as `eval_<name>` to logs and callbacks.
    keep:     how many checkpoints stay, beside the best validation's where `keeps_best`
    patience: stop after so many validations in a row that are not the best so far; None to go on
    The best validation is that of the arguments' `metric_for_best_model` and `greater_is_better`. The last step is
    validated too, whatever `eval_steps` is.

    A run that is continued from any of its checkpoints (`train(resume_from_checkpoint=…)`) ends with the same bits.
    Raises FloatingPointError where a loss or a gradient is not finite, before the weights are touched: the last
    checkpoint stays good. Needs `max_steps` and `ignore_data_skip` in the arguments.
    """

    model: PreTrainedModel

    def __init__(
        self,
        *,
        feed: Feed,
        validate: Validate | None,
        keep: int = 2,
        keeps_best: bool = False,
        patience: int | None = None,
        **kwargs: Any,
    ) -> None:
        dataset: Any = _FeedDataset(feed, lambda: self.state.global_step)
        super().__init__(train_dataset=dataset, eval_dataset=dataset, **kwargs)
        if self.args.max_steps < 1 or not self.args.ignore_data_skip:
            raise ValueError(
                f"max_steps={self.args.max_steps}, ignore_data_skip={self.args.ignore_data_skip}: a feed has no end "
                "and finds its place itself; set max_steps to at least 1, and ignore_data_skip=True"
            )
        self._refuse_arguments(feed, keep, keeps_best, patience)
        self.feed, self.validate, self.keep = feed, validate, keep
        self.keeps_best, self.patience = keeps_best, patience
        self.add_callback(_ValidateLast)
        # So that Trainer counts the labels of all accumulated batches, by which the loss is then divided.
        self.model_accepts_loss_kwargs = self.loss_is_scaled_for_ga = True
        self._checkpoint: Checkpoint | None = None
        self._seconds_before = 0.0
        self._started = time.perf_counter()

    def _refuse_arguments(self, feed: Feed, keep: int, keeps_best: bool, patience: int | None) -> None:
        args = self.args
        if keep < 1 or (patience is not None and patience < 1):
            raise ValueError(f"keep={keep} and patience={patience} must be at least 1; patience=None for no end")
        if args.eval_on_start or args.save_total_limit is not None:
            raise ValueError("eval_on_start and save_total_limit are not for this trainer; `keep` counts checkpoints")
        if keeps_best or patience is not None:
            if args.metric_for_best_model is None:
                raise ValueError("metric_for_best_model is not set in the arguments; name the metric of the best")
            for name in ("eval_strategy", "save_strategy"):
                if getattr(args, name) != "steps":
                    raise ValueError(f"{name}={getattr(args, name)!s}: the best is found by steps; set 'steps'")
        if keeps_best and (args.eval_steps or 0) % args.save_steps:
            raise ValueError(
                f"eval_steps={args.eval_steps} must be a multiple of save_steps={args.save_steps}: the best validation "
                "must have a checkpoint"
            )
        own = {
            "batch_size": args.per_device_train_batch_size,
            "accumulate": args.gradient_accumulation_steps,
            "rank": args.process_index,
            "world": args.world_size,
        }
        for name, value in own.items():
            if getattr(feed, name, value) != value:
                raise ValueError(f"the feed has {name}={getattr(feed, name)}, and the arguments say {value}")

    @property
    def folder(self) -> Path:
        """Where the checkpoints are."""
        return Path(self.args.output_dir or ".")

    @property
    def seconds(self) -> float:
        """How long the training has taken, with its validations; over all processes that it was continued in."""
        return self._seconds_before + time.perf_counter() - self._started

    def get_train_dataloader(self) -> DataLoader[Any]:
        # Without workers nothing is read ahead; with a generator of its own no random number of the run is drawn.
        dataset: Any = self.train_dataset
        return DataLoader(dataset, batch_size=None, generator=torch.Generator())

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        # Matrices alone: no biases, norms, Δ biases and skip connections, and not the decay rates A of a recurrence.
        return [n for n, p in model.named_parameters() if p.ndim >= 2 and not n.endswith("A_log")]

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        self._refuse_infinite("loss", loss.item())
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        # In float16 an overflow is the scaler's business: it leaves the step out and scales less.
        if not self.args.fp16:
            self._refuse_infinite("norm of the gradient", float(norm))
        return norm

    def _refuse_infinite(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            last = self.folder if list(self.folder.glob("checkpoint-*")) else None
            kept = f"the last checkpoint in {last} is kept" if last else "no checkpoint was written yet"
            raise FloatingPointError(
                f"the {what} is {value} at step {self.state.global_step + 1} (batch {self.state.global_step}); {kept}; "
                "train with a lower learning rate, a longer warmup or a smaller clipping norm"
            )

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        was_training = self.model.training
        self.model.eval()
        metrics = {f"eval_{name}": value for name, value in self._validated().items()}
        self.model.train(was_training)
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        if self.patience is not None and self._validations_since_best() >= self.patience:
            self.control.should_training_stop = self.control.should_save = True
        return metrics

    def _validated(self) -> dict[str, float]:
        """The metrics of the model as it is, the same on every process."""
        assert self.validate is not None  # Trainer evaluates only where eval_strategy asks for it
        return self.validate(self.model, self.state.global_step)

    def log(self, logs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
        # Left out: a mean over steps of several processes, and numbers that JSON has not (a norm that overflowed in
        # float16).
        told = {k: v for k, v in logs.items() if not (isinstance(v, float) and not math.isfinite(v))}
        told.pop("train_loss", None)
        self.state.epoch = self.state.global_step / self.args.max_steps
        super().log(told, *args, **kwargs)

    def validations(self) -> list[tuple[int, float]]:
        """The step and the metric of every validation so far, those before a resume included."""
        key = "eval_" + str(self.args.metric_for_best_model).removeprefix("eval_")
        return [(int(entry["step"]), entry[key]) for entry in self.state.log_history if key in entry]

    def best_step(self) -> int | None:
        """The step of the best validation so far, the first of equal ones; None without any."""
        found = self.validations()
        return found[self._best(found)][0] if found else None

    def _best(self, found: list[tuple[int, float]]) -> int:
        sign = 1 if self.args.greater_is_better else -1
        return max(range(len(found)), key=lambda i: sign * found[i][1])

    def _validations_since_best(self) -> int:
        found = self.validations()
        return len(found) - 1 - self._best(found) if found else 0

    def _own_state(self) -> dict[str, Any]:
        """What each process keeps of itself in a checkpoint; JSON."""
        return {"random": random_state(), "loss": self._tr_loss.item()}

    def _shared_state(self) -> dict[str, Any]:
        """What a checkpoint keeps once; JSON."""
        assert self.lr_scheduler is not None
        scaler = getattr(self.accelerator, "scaler", None)
        return {
            "step": self.state.global_step,
            "is_last": self.control.should_training_stop,
            "schedule": self.lr_scheduler.state_dict(),
            "scaler": None if scaler is None else scaler.state_dict(),
            "logged": self._globalstep_last_logged,
            "seconds": round(self.seconds, 3),
            "data": self.feed.state(),
        }

    def _tensors(self) -> tuple[dict[str, Tensor] | None, dict[str, Any], dict[str, dict[str, Tensor]]]:
        """The weights (None for those of the model), the optimiser's state, and the tensors of further files."""
        optimizer: Any = self.optimizer
        return None, optimizer.state_dict(), {}

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # With several processes all take part: in gathering what is split, and each with its random state.
        processes = gather_object([self._own_state()])
        weights, optimizer, others = self._tensors()
        if self.is_world_process_zero():
            state = {**self._shared_state(), "processes": processes}
            target = self.folder / f"checkpoint-{self.state.global_step}"
            saved: Any = self.state.stateful_callbacks
            for callback in self._stateful():
                saved[type(callback).__name__] = callback.state()
            write_checkpoint(target, self.model, weights, optimizer, state, asdict(self.state), others)
            remove_old(self.folder, self.keep, self.best_step() if self.keeps_best else None)
        self.accelerator.wait_for_everyone()

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        self._checkpoint = None
        if isinstance(resume_from_checkpoint, bool):
            raise ValueError(f"resume_from_checkpoint={resume_from_checkpoint} must be a checkpoint's folder")
        if resume_from_checkpoint is not None:
            self._checkpoint = open_checkpoint(Path(resume_from_checkpoint))
            if self._checkpoint is None:
                raise ValueError(f"{resume_from_checkpoint} is no complete checkpoint")
            self._load_weights(self._checkpoint)
        for callback in self.callback_handler.callbacks:
            check = getattr(callback, "check_trainer", None)  # of a callback that not every trainer can have
            if check is not None:
                check(self)
        self._reset()
        self._start_clock()
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _reset(self) -> None:
        """Forget what an earlier call of `train` has left in this object."""

    def _stateful(self) -> list[Any]:
        callbacks: list[Any] = [*self.callback_handler.callbacks, self.control]
        return [callback for callback in callbacks if isinstance(callback, ExportableState)]

    def _load_callback_state(self) -> None:
        # Trainer's own does it only where an argument says so.
        known: Any = self.state.stateful_callbacks
        for callback in self._stateful():
            saved = known.get(type(callback).__name__)
            if isinstance(saved, dict) and callback is not self.control:
                for name, value in saved.get("attributes", {}).items():
                    setattr(callback, name, value)

    def restore_finished(self, checkpoint: Checkpoint) -> None:
        """Take over a checkpoint that was the last of its training: there is nothing left to train.

        Raises InputError where that training was planned for another number of steps, to which its schedule led.
        """
        state = TrainerState.load_from_json(str(checkpoint.folder / TRAINER_STATE))
        if state.max_steps != self.args.max_steps:
            raise InputError(
                f"the training in {self.folder} was of max_steps={state.max_steps} and has ended; max_steps="
                f"{self.args.max_steps} is another training: give it another folder"
            )
        self._load_weights(checkpoint)
        self._checkpoint = checkpoint
        self._start_clock()
        self.state = state

    def _start_clock(self) -> None:
        known = 0.0 if self._checkpoint is None else self._checkpoint.state["seconds"]
        self._seconds_before = max(known, self._seconds_before)
        self._started = time.perf_counter()

    def _load_weights(self, checkpoint: Checkpoint) -> None:
        load_weights(self.model, checkpoint.folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Done in `train`, before the model is wrapped."""

    def _load_optimizer(self, state: dict[str, Any]) -> None:
        optimizer: Any = self.optimizer
        optimizer.load_state_dict(state)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if self._checkpoint is None:
            return
        self._load_optimizer(read_optimizer(self._checkpoint))
        assert self.lr_scheduler is not None
        self.lr_scheduler.load_state_dict(self._checkpoint.state["schedule"])
        self.feed.restore(self._checkpoint.state["data"])

    def _load_scaler(self, checkpoint: str | None) -> None:
        scaler = getattr(self.accelerator, "scaler", None)
        if self._checkpoint is not None and scaler is not None and self._checkpoint.state["scaler"] is not None:
            scaler.load_state_dict(self._checkpoint.state["scaler"])

    def _load_rng_state(self, checkpoint: str | None) -> None:
        # Called right before the first step.
        state = {"processes": []} if self._checkpoint is None else self._checkpoint.state
        if self.args.process_index < len(state["processes"]):
            own = state["processes"][self.args.process_index]
            restore_random_state(own["random"])
            # So that the next log tells the mean of all the steps since the last.
            self._tr_loss += own["loss"]
            self._globalstep_last_logged = state["logged"]
            self._restore_own(own)

    def _restore_own(self, own: dict[str, Any]) -> None:
        """Take over what `_own_state` of this process held besides."""


class _ValidateLast(TrainerCallback):
    """Where steps are validated the last one is too, though it be no multiple of `eval_steps`."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps and args.eval_strategy == IntervalStrategy.STEPS:
            control.should_evaluate = True


class _FeedDataset(IterableDataset[dict[str, Tensor]]):
    def __init__(self, feed: Feed, step: Callable[[], int]) -> None:
        self.feed, self.step = feed, step

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return self.feed.batches(self.step())
