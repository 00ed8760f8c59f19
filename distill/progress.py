"""What a person sees while a model trains, and what the log keeps of it."""

import math
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from neural_layers.distill.run_folder import RunFolder


class ProgressBar(TrainerCallback):
    """One bar for the training of one model, with its loss and its last score; every log goes to the run's log too.

    score: the metric to show. trainer: set before the training; the log tells how often it has gone back so far.
    """

    def __init__(self, name: str, run: RunFolder, score: str = "bleu") -> None:
        self.name, self.run, self.score = name, run, score
        self.shown: dict[str, str] = {}
        self.trainer: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc=self.name, unit="step", smoothing=0.1)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.bar.update(state.global_step - self.bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        # A gradient norm may overflow while the loss stays finite; JSON has no number for it.
        finite = {k: v if math.isfinite(v) else None for k, v in (logs or {}).items()}
        branch = {"rollbacks": len(self.trainer.rollbacks)} if self.trainer and self.trainer.rollbacks else {}
        self.run.append_log({"model": self.name, "step": state.global_step, **branch, **finite})
        loss, score = finite.get("loss"), finite.get(f"eval_{self.score}")
        if loss is not None:
            self.shown["loss"] = f"{loss:.3f}"
        if score is not None:
            self.shown[self.score] = f"{score:.4g}"
        self.bar.set_postfix(self.shown, refresh=False)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.bar.close()
