"""The trainer of language models: exact resume, checkpoints without pickles, sharded parameters."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate.utils import gather_object
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset
from transformers import PreTrainedModel, Trainer, TrainerState

from neural_layers.distill.recipes.language_model_checkpoint import (
    TRAINER_STATE,
    WEIGHTS,
    Checkpoint,
    load_weights,
    open_checkpoint,
    random_state,
    read_optimizer,
    remove_old,
    restore_random_state,
    write_checkpoint,
)
from neural_layers.distill.recipes.language_model_sharding import (
    load_sharded_optimizer,
    load_sharded_weights,
    shard,
    whole_optimizer,
    whole_weights,
)

Validate = Callable[[nn.Module, int], dict[str, float]]


class Feed(Protocol):
    """Training batches, the same ones for the same step however often the run was interrupted."""

    def batches(self, step: int) -> Iterator[dict[str, Tensor]]:
        """The batches of this process from optimiser step `step` (counted from 0) on, without end."""

    def state(self) -> dict[str, Any]:
        """What `restore` needs besides the step; JSON."""

    def restore(self, state: dict[str, Any]) -> None:
        """Continue behind the last batch that was given out when `state` was called."""


class LanguageModelTrainer(Trainer):
    """`transformers.Trainer` for a causal language model with the arguments of `HybridForCausalLM`.

    feed:            gives the batches, instead of a dataset
    validate:        `validate(model, step) → metrics` with `loss`, called by every process; None for none
    label_smoothing: ε of the training loss
    patience:        stop after so many validations in a row without a better `loss`; None to go on
    keep:            how many checkpoints stay (the best besides, where there is `patience`)
    fsdp:            split parameters, gradients and optimiser state over the processes (FSDP2)

    A run that is continued from any of its checkpoints (`train(resume_from_checkpoint=…)`) ends with the same bits.
    Raises FloatingPointError where a loss or a gradient is not finite, before the weights are touched: the last
    checkpoint stays good.
    """

    model: PreTrainedModel

    def __init__(
        self,
        *,
        feed: Feed,
        validate: Validate | None,
        label_smoothing: float = 0.0,
        patience: int | None = None,
        keep: int = 2,
        fsdp: bool = False,
        **kwargs: Any,
    ) -> None:
        dataset: Any = _FeedDataset(feed, lambda: self.state.global_step)
        super().__init__(train_dataset=dataset, eval_dataset=dataset, **kwargs)
        self.feed, self.validate, self.label_smoothing = feed, validate, label_smoothing
        self.patience, self.keep, self.fsdp = patience, keep, fsdp
        self.model_accepts_loss_kwargs = self.loss_is_scaled_for_ga = True
        if fsdp:
            shard(self.model, self.args.device)
            # What transformers calls a model that owns the placement of its parameters: it is not wrapped again.
            self.is_distributed_loading_by_transformers = True

    @property
    def folder(self) -> Path:
        """Where the checkpoints are."""
        return Path(self.args.output_dir or ".")

    def get_train_dataloader(self) -> DataLoader[Any]:
        # Without workers nothing is read ahead; with a generator of its own no random number of the run is drawn.
        dataset: Any = self.train_dataset
        return DataLoader(dataset, batch_size=None, generator=torch.Generator())

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        # Matrices alone: no biases, norms, Δ biases and skip connections, and not the decay rates A of a recurrence.
        return [n for n, p in model.named_parameters() if p.ndim >= 2 and not n.endswith("A_log")]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        outputs = model(**inputs, label_smoothing=self.label_smoothing, num_items_in_batch=num_items_in_batch)
        # The labels are counted over all processes, and their gradients are then averaged.
        loss = outputs.loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def training_step(self, *args: Any, **kwargs: Any) -> Tensor:
        loss = super().training_step(*args, **kwargs)
        self._refuse_infinite("loss", loss.item())
        return loss

    def _get_grad_norm(self, model: nn.Module, grad_norm: Any = None) -> Any:
        norm = super()._get_grad_norm(model, grad_norm=grad_norm)
        self._refuse_infinite("norm of the gradient", float(norm))
        return norm

    def _refuse_infinite(self, what: str, value: float) -> None:
        if not math.isfinite(value):
            last = self.folder if list(self.folder.glob("checkpoint-*")) else None
            kept = f"the last checkpoint in {last} is kept" if last else "no checkpoint was written yet"
            raise FloatingPointError(
                f"the {what} is {value} at step {self.state.global_step + 1} (batch {self.state.global_step}); {kept}; "
                "train with a lower --lr, a longer --warmup or a smaller --clip"
            )

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        assert self.validate is not None  # Trainer evaluates only where eval_strategy asks for it
        was_training = self.model.training
        self.model.eval()
        metrics = {f"eval_{k}": v for k, v in self.validate(self.model, self.state.global_step).items()}
        self.model.train(was_training)
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        losses = self.validation_losses()
        if self.patience is not None and losses:
            best = min(range(len(losses)), key=lambda i: losses[i][1])
            if len(losses) - 1 - best >= self.patience:
                self.control.should_training_stop = self.control.should_save = True
        return metrics

    def validation_losses(self) -> list[tuple[int, float]]:
        """The step and the loss of every validation so far, those before a resume included."""
        return [(int(entry["step"]), entry["eval_loss"]) for entry in self.state.log_history if "eval_loss" in entry]

    def best_step(self) -> int | None:
        """The step of the validation with the lowest loss; None without any."""
        losses = self.validation_losses()
        return min(losses, key=lambda pair: pair[1])[0] if losses else None

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        # With several processes all take part: in gathering what is split, and each with its random state.
        own = {"random": random_state(), "loss": self._tr_loss.item()}
        processes = gather_object([own])
        weights = whole_weights(self.model) if self.fsdp else None
        optimizer: Any = self.optimizer
        optimizer = whole_optimizer(self.model, optimizer.optimizer) if self.fsdp else optimizer.state_dict()
        if self.is_world_process_zero():
            assert self.lr_scheduler is not None
            state = {
                "step": self.state.global_step,
                "is_last": self.control.should_training_stop,
                "schedule": self.lr_scheduler.state_dict(),
                "processes": processes,
                "logged": self._globalstep_last_logged,
                "data": self.feed.state(),
            }
            target = self.folder / f"checkpoint-{self.state.global_step}"
            write_checkpoint(target, self.model, weights, optimizer, state, asdict(self.state))
            remove_old(self.folder, self.keep, self.best_step() if self.patience is not None else None)
        self.accelerator.wait_for_everyone()

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        if resume_from_checkpoint is not None:
            found = open_checkpoint(Path(resume_from_checkpoint))
            if found is None:
                raise ValueError(f"{resume_from_checkpoint} is no complete checkpoint")
            self._checkpoint: Checkpoint = found
            self._load_weights(found)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    @contextmanager
    def _defer_fsdp_gradient_reduction(self) -> Iterator[None]:
        # Trainer's own asks the model's config how transformers split it.
        model: Any = self.model
        model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            model.set_requires_gradient_sync(True)

    def restore_finished(self, checkpoint: Checkpoint) -> None:
        """Take over a checkpoint that was the last of its training: there is nothing left to train."""
        self._load_weights(checkpoint)
        self.state = TrainerState.load_from_json(str(checkpoint.folder / TRAINER_STATE))

    def weights_of(self, step: int) -> dict[str, Tensor] | None:
        """The weights after `step`, from its checkpoint where that is another than the last or the model is split; None
        where the model has them."""
        if step == self.state.global_step and not self.fsdp:
            return None
        return load_file(self.folder / f"checkpoint-{step}" / WEIGHTS)

    def _load_weights(self, checkpoint: Checkpoint) -> None:
        if self.fsdp:
            load_sharded_weights(self.model, load_file(checkpoint.folder / WEIGHTS))
        else:
            load_weights(self.model, checkpoint.folder)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        """Done in `train`, before the model is wrapped."""

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is None:
            return
        state = read_optimizer(self._checkpoint)
        optimizer: Any = self.optimizer
        if self.fsdp:
            load_sharded_optimizer(self.model, optimizer.optimizer, state)
        else:
            optimizer.load_state_dict(state)
        assert self.lr_scheduler is not None
        self.lr_scheduler.load_state_dict(self._checkpoint.state["schedule"])
        self.feed.restore(self._checkpoint.state["data"])

    def _load_rng_state(self, checkpoint: str | None) -> None:
        # Called right before the first step.
        state = self._checkpoint.state if checkpoint is not None else {"processes": []}
        if self.args.process_index < len(state["processes"]):
            own = state["processes"][self.args.process_index]
            restore_random_state(own["random"])
            # So that the next log tells the mean of all the steps since the last.
            self._tr_loss += own["loss"]
            self._globalstep_last_logged = state["logged"]


class _FeedDataset(IterableDataset[dict[str, Tensor]]):
    def __init__(self, feed: Feed, step: Callable[[], int]) -> None:
        self.feed, self.step = feed, step

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        return self.feed.batches(self.step())
