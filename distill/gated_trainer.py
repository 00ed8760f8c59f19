"""A trainer whose validations are watched by a gate: where the model gets worse it goes back to its best."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

from accelerate.utils import broadcast_object_list
from torch import nn
from tqdm.auto import tqdm

from neural_layers.distill.checkpoint import load_weights, newest_checkpoint, open_checkpoint, remove_leftovers
from neural_layers.distill.exact_trainer import ExactTrainer
from neural_layers.distill.gate import QualityGate, Rollback
from neural_layers.distill.gate_state import GateState
from neural_layers.distill.validation.measures import Measure
from neural_layers.errors import InputError


class Validator(Protocol):
    """Scores a model; keeps each validation as `folder/step-N.json`."""

    folder: Path
    measures: dict[str, Measure]

    def __call__(self, model: nn.Module, step: int) -> dict[str, float]:
        """The scores, of which the measures are then in `measures`."""

    def load(self, step: int) -> dict[str, Measure]:
        """The measures of an earlier step, out of its file."""

    def set_best(self, step: int | None) -> None:
        """Which earlier validation the next one is compared with as the best."""


class GatedTrainer(ExactTrainer):
    """An `ExactTrainer` that goes back to its best checkpoint where a validation is degraded.

    validate: a `Validator`, called by the first process alone; None for none
    gate:     watches the validations. Where one is degraded, the training goes back to the checkpoint of the best:
              weights, optimiser, schedule, data order and random state, with a lower learning rate; after `patience` of
              these it ends. `rollbacks` and `outcome` tell. None for no gate
    When `train` returns, the model has the weights of the best validation, where the arguments name a
    `metric_for_best_model`; with a gate it is the gate's.

    Raises ValueError for a gate without validation or with another best metric, for `optimizers`, for validations that
    are not saved, and where the arguments say that more is better and the validator that less is, or the other way
    round; InputError where the checkpoint to go back to, or to continue from, is broken.
    """

    def __init__(self, *, validate: Validator | None = None, gate: QualityGate | None = None, **kwargs: Any) -> None:
        has_best = kwargs["args"].metric_for_best_model is not None
        super().__init__(validate=validate, **{"keeps_best": has_best, **kwargs})
        if self.optimizer is not None or self.lr_scheduler is not None:
            raise ValueError("optimizers were given; a rollback makes them anew, so name them in the arguments instead")
        self.gate = gate
        self._record = GateState(self.folder)
        self._going_back = False
        if gate is None:
            return
        if validate is None or str(self.args.metric_for_best_model).removeprefix("eval_") != gate.metric:
            raise ValueError(
                f"a gate on {gate.metric!r} needs validate, and metric_for_best_model={gate.metric!r} in the arguments"
            )

    @property
    def rollbacks(self) -> list[Rollback]:
        """The degradations that were found, and taken back."""
        return self._record.rollbacks

    @property
    def outcome(self) -> str:
        """ "finished", or "stopped" where the gate ended the training."""
        return "finished" if self._record.stopped_at is None else "stopped"

    @property
    def steps(self) -> int:
        """The step at which the training was last."""
        return self.state.global_step if self._record.stopped_at is None else self._record.stopped_at

    def run(self) -> None:
        """Train to the end, from the last checkpoint in the folder where there is one."""
        self._open_record()
        found = newest_checkpoint(self.folder)
        if found is None and any(self.folder.glob("checkpoint-*")):
            raise InputError(f"no checkpoint in {self.folder} is complete; remove the folder to train anew")
        if found is not None and (found.state["is_last"] or self.outcome == "stopped"):
            self.restore_finished(found)
            self._take_best()
        else:
            self.train(None if found is None else str(found.folder))

    def train(self, resume_from_checkpoint: Any = None, *args: Any, **kwargs: Any) -> Any:
        if resume_from_checkpoint is not None:
            self._open_record()
        elif any(self.folder.glob("checkpoint-*")):
            raise ValueError(
                f"{self.folder} holds checkpoints of an earlier training; continue it by run(), or give another folder"
            )
        elif self.is_world_process_zero():
            self._record = GateState(self.folder, self._validations)
            self._record.begin()
        while True:
            self._going_back = False
            output = super().train(resume_from_checkpoint, *args, **kwargs)
            if not self._going_back:
                break
            self._seconds_before = self.seconds  # what was given up took its time too
            resume_from_checkpoint = str(self.folder / f"checkpoint-{self.rollbacks[-1].to}")
        self._take_best()
        return output

    def _reset(self) -> None:
        super()._reset()
        # Made anew, as in a process that resumes: what a checkpoint holds is all that the next step depends on.
        self.optimizer = self.lr_scheduler = None

    @property
    def _validations(self) -> Path | None:
        return getattr(self.validate, "folder", None) if self.is_world_process_zero() else None

    def _open_record(self) -> None:
        """Read what was decided; the first process carries out what is not done yet, and removes halves of files."""
        with self.args.main_process_first(desc="the gate's record"):
            if self.is_world_process_zero():
                remove_leftovers(self.folder)
            self._record = GateState.open(self.folder, self._validations)

    def _take_best(self) -> None:
        best = self.best_step() if self.keeps_best else None
        if best is not None and (best != self.state.global_step or self.outcome == "stopped"):
            load_weights(self.model, self.folder / f"checkpoint-{best}")

    def _shared_state(self) -> dict[str, Any]:
        return {**super()._shared_state(), "rollbacks": len(self.rollbacks)}

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self.gate is None or self._checkpoint is None:
            return
        factor = self._record.factor(self._checkpoint.state, self.gate.lr_factor)
        optimizer, schedule = self.optimizer, self.lr_scheduler
        assert optimizer is not None
        assert schedule is not None
        for group in optimizer.param_groups:
            group["lr"] *= factor
            group["initial_lr"] *= factor
        schedule.base_lrs = [rate * factor for rate in schedule.base_lrs]
        schedule._last_lr = [group["lr"] for group in optimizer.param_groups]

    def _validated(self) -> dict[str, float]:
        assert self.validate is not None
        metrics: dict[str, float] = {}
        if self.is_world_process_zero():
            validate: Any = self.validate
            validate.set_best(self.best_step() if self.keeps_best else None)
            metrics = validate(self.model, self.state.global_step)
            self._check_direction(getattr(validate, "measures", {}))
        (metrics,) = broadcast_object_list([metrics])
        return metrics

    def _check_direction(self, measures: dict[str, Measure]) -> None:
        metric = str(self.args.metric_for_best_model).removeprefix("eval_")
        if self.keeps_best and metric in measures and measures[metric].higher_is_better != self.args.greater_is_better:
            right = measures[metric].higher_is_better
            raise ValueError(
                f"greater_is_better={self.args.greater_is_better} is wrong for {metric}; set it to {right}"
            )

    def evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        best = self.best_step() if self.gate is not None else None
        metrics = super().evaluate(*args, **kwargs)
        if self.gate is not None and best is not None and self.is_in_train:
            self._judge(self.gate, best)
        return metrics

    def _judge(self, gate: QualityGate, best: int) -> None:
        """Compare the validation that was just made with the best before it, and go back where it is degraded."""
        decision: list[Any] = [None]
        if self.is_world_process_zero():
            validate: Any = self.validate
            found = gate.compare(validate.measures[gate.metric], validate.load(best)[gate.metric])
            if gate.is_degraded(found):
                factor = gate.lr_factor ** (len(self.rollbacks) + 1)
                step, scores = self.state.global_step, (found.reference, found.value, found.low, found.high)
                decision = [Rollback(step, best, gate.metric, *scores, factor)]
        (rollback,) = broadcast_object_list(decision)
        if rollback is None:
            return
        self.control.should_training_stop, self.control.should_save = True, False
        if len(self.rollbacks) >= gate.patience:
            self._decide(lambda: self._record.stop(rollback.step))
            self._say(f"{rollback}: the training ends with the best after {gate.patience} rollbacks")
            return
        if open_checkpoint(self.folder / f"checkpoint-{best}") is None:
            kept = self.folder / f"checkpoint-{best}"
            raise InputError(
                f"{rollback}, but {kept} is missing or broken; nothing was removed: put it back, or train anew in "
                "another folder"
            )
        self._going_back = True
        self._decide(lambda: self._record.add(rollback))
        self._say(f"{rollback}: back to it, learning rate × {rollback.learning_rate_factor:g}")

    def _decide(self, decide: Callable[[], None]) -> None:
        if self.is_world_process_zero():
            decide()
        self.accelerator.wait_for_everyone()
        if not self.is_world_process_zero():
            self._record = GateState.open(self.folder, None)

    def _say(self, line: str) -> None:
        if self.is_world_process_zero():
            tqdm.write(line)
