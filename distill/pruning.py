"""Pruning in the course of a training: a callback for any `transformers.Trainer`, ours included."""

from dataclasses import asdict
from typing import Any

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState

from neural_layers.errors import InputError
from neural_layers.wrappers.pruning import PruningReport, PruningSchedule, masks, prune, restore_masks, unprune
from neural_layers.wrappers.pruning.masks import hold
from neural_layers.wrappers.pruning.saving import noted_without_masks, record

_TAKEN = ("amount", "of")
_BEST = "that may be one of before the pruning; train without patience and gate, and take the last"
_SPLIT = "pruning holds the model's own parameters, and FSDP and DeepSpeed train parts of them; train without"
_LISTS = ("include", "exclude", "kinds")


class PruningCallback(TrainerCallback, ExportableState):
    """Prunes the model that is trained step by step, with retraining in between, as a `PruningSchedule` says.

    schedule: when, and to which share; a `PruningSchedule`, or a dict of its fields
    method:   of `prune`, "l1" or another that takes an amount
    options:  further arguments of `prune` (scope, include, …) but for `amount` and `of`, which are the schedule's

    A checkpoint holds the pruned weights as zeros, and in the trainer's state which layers are pruned and which of
    their zeros are none of pruning's: a training that is continued (by `ExactTrainer`, or by `Trainer` with
    `restore_callback_states_from_checkpoint=True`) goes on with the same masks, to the same bits. The pruned share is
    logged as `sparsity`. `reports` has the report of each pruning, by the step before which it was done.

    Raises ValueError when the training begins: where it is shorter than the schedule; where it ends with the best of
    its checkpoints (`load_best_model_at_end`, `patience`, a gate), which would be one before the pruning; and under
    FSDP or DeepSpeed, which train other parameters than the model's. InputError where a checkpoint's masks are of
    another model.
    """

    def __init__(self, schedule: PruningSchedule | dict[str, Any], method: str = "l1", **options: Any) -> None:
        for name in _TAKEN:
            if name in options:
                raise ValueError(f"{name}={options[name]!r} is the schedule's to say; leave it out")
        self.schedule = PruningSchedule(**schedule) if isinstance(schedule, dict) else schedule
        if method == "n:m" and self.schedule.times > 1:
            raise ValueError(f"times={self.schedule.times}: method='n:m' prunes a fixed share at once; set times=1")
        self.method = method
        self.options: dict[str, Any] = {n: list(v) if n in _LISTS else v for n, v in options.items()}
        self.reports: dict[int, PruningReport] = {}
        # What a checkpoint holds of the masks: by layer, the places of zeros that are not pruned. None: not continued.
        self.unpruned_zeros: dict[str, list[int]] | None = None
        self._model: nn.Module | None = None

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps; JSON."""
        zeros = {} if self._model is None else _unpruned_zeros(self._model)
        own = {"schedule": asdict(self.schedule), "method": self.method, **self.options}
        return {"args": own, "attributes": {"unpruned_zeros": zeros}}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._refuse(args, state)
        self._model = kwargs["model"]
        if state.global_step > 0:
            if self.unpruned_zeros is None and state.global_step > self.schedule.start:
                raise ValueError(
                    "the training is continued without the callback's state; set "
                    "restore_callback_states_from_checkpoint=True in the arguments, and continue a training that had it"
                )
            _restore(self._model, self.unpruned_zeros or {})
        elif noted_without_masks(self._model):
            restore_masks(self._model)  # a pruned model that was loaded: it is trained as one
        self.unpruned_zeros = None

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        amount = self.schedule.amount(state.global_step)
        if amount is not None:
            assert self._model is not None
            # Earlier prunings count: `amount` is of all weights, as by default.
            self.reports[state.global_step] = prune(self._model, self.method, amount, **self.options)

    def on_log(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        found = {} if self._model is None else masks(self._model)
        if found and kwargs.get("logs") is not None:
            kept = sum(int(mask.sum()) for mask in found.values())
            share = 1 - kept / sum(mask.numel() for mask in found.values())
            kwargs["logs"]["sparsity"] = state.log_history[-1]["sparsity"] = share

    def _refuse(self, args: TrainingArguments, state: TrainerState) -> None:
        if state.max_steps < self.schedule.steps:
            raise ValueError(
                f"max_steps={state.max_steps} is less than the {self.schedule.steps} steps of the pruning's schedule: "
                f"the last is before step {self.schedule.last}, and recovery={self.schedule.recovery}; train longer"
            )
        if args.load_best_model_at_end:
            raise ValueError(f"load_best_model_at_end=True: {_BEST}")
        if args.fsdp or args.deepspeed:
            raise ValueError(_SPLIT)

    def check_trainer(self, trainer: Any) -> None:
        """Raise ValueError for an `ExactTrainer` that pruning does not go with; called before it trains."""
        if trainer.keeps_best:
            raise ValueError(f"the trainer keeps its best checkpoint: {_BEST}")
        if getattr(trainer, "fsdp", False):
            raise ValueError(_SPLIT)


def _unpruned_zeros(model: nn.Module) -> dict[str, list[int]]:
    """By layer that is pruned: the places, in the flat weight, of zeros that its mask does not prune; few if any."""
    found = {}
    for name, mask in masks(model).items():
        zeros = (model.get_submodule(name).get_parameter("weight") == 0) & mask
        found[name] = zeros.flatten().nonzero().flatten().tolist()
    return found


def _restore(model: nn.Module, unpruned: dict[str, list[int]]) -> None:
    """Make the masks those of a checkpoint, whose weights the model has."""
    known = dict(model.named_modules())
    stray = [name for name in unpruned if name not in known]
    if stray:
        raise InputError(f"the checkpoint's masks are of another model: there is no layer {stray[0]}")
    unprune(model)
    for name, places in unpruned.items():
        mask = known[name].get_parameter("weight").detach() != 0
        mask.view(-1)[torch.tensor(places, dtype=torch.long, device=mask.device)] = True
        hold(known[name], mask)
    record(model)
