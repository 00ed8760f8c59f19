"""What a person sees while a model trains, and what the log keeps of it."""

import math
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from neural_layers.distill.run_folder import RunFolder


class ProgressBar(TrainerCallback):
    """One bar for the training of one model, with its loss and last BLEU; every log goes to the run's log too."""

    def __init__(self, name: str, run: RunFolder) -> None:
        self.name, self.run = name, run
        self.shown: dict[str, str] = {}
        self.records: list[dict[str, float | None]] = []

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
        record: dict[str, float | None] = {"step": state.global_step, **finite}
        self.run.append_log({"model": self.name, **record})
        self.records.append(record)
        if record.get("loss") is not None:
            self.shown["loss"] = f"{record['loss']:.3f}"
        if record.get("eval_bleu") is not None:
            self.shown["BLEU"] = f"{record['eval_bleu']:.1f}"
        self.bar.set_postfix(self.shown, refresh=False)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.bar.close()
