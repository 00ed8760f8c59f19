"""The trainer of language models: its loss, early stopping, and parameters that are split over processes."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from safetensors.torch import load_file
from torch import Tensor, nn

from neural_layers.distill.checkpoint import WEIGHTS, Checkpoint, load_weights
from neural_layers.distill.exact_trainer import ExactTrainer
from neural_layers.distill.recipes.language_model_sharding import (
    load_sharded_optimizer,
    load_sharded_weights,
    shard,
    whole_optimizer,
    whole_weights,
)


class LanguageModelTrainer(ExactTrainer):
    """An `ExactTrainer` for a causal language model with the arguments of `HybridForCausalLM`.

    label_smoothing: ε of the training loss
    patience:        as in `ExactTrainer`; with it the best validation's checkpoint stays too
    fsdp:            split parameters, gradients and optimiser state over the processes (FSDP2)
    `validate` is called by every process.
    """

    def __init__(
        self,
        *,
        label_smoothing: float = 0.0,
        patience: int | None = None,
        fsdp: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(keeps_best=patience is not None, patience=patience, **kwargs)
        self.label_smoothing, self.fsdp = label_smoothing, fsdp
        if fsdp:
            shard(self.model, self.args.device)
            # What transformers calls a model that owns the placement of its parameters: it is not wrapped again.
            self.is_distributed_loading_by_transformers = True

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

    def _tensors(self) -> tuple[dict[str, Tensor] | None, dict[str, Any], dict[str, dict[str, Tensor]]]:
        if not self.fsdp:
            return super()._tensors()
        optimizer: Any = self.optimizer
        return whole_weights(self.model), whole_optimizer(self.model, optimizer.optimizer), {}

    @contextmanager
    def _defer_fsdp_gradient_reduction(self) -> Iterator[None]:
        # Trainer's own asks the model's config how transformers split it.
        model: Any = self.model
        model.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            model.set_requires_gradient_sync(True)

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

    def _load_optimizer(self, state: dict[str, Any]) -> None:
        if not self.fsdp:
            super()._load_optimizer(state)
            return
        optimizer: Any = self.optimizer
        load_sharded_optimizer(self.model, optimizer.optimizer, state)
