"""What a person sees while a language model trains."""

import math
import time
from pathlib import Path
from typing import Any

from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from neural_layers.distill.run_folder import RunFolder


class LanguageModelProgress(TrainerCallback):
    """A bar with step, loss, validation and tokens/s and the time that remains; the log and TensorBoard get the same.

    run: whose `train_log.jsonl` and `tensorboard/` are written. tokens: of one step, over all processes
    tensorboard: whether that is written
    """

    def __init__(self, run: RunFolder, tokens: int, tensorboard: bool = True) -> None:
        self.run, self.tokens, self.tensorboard = run, tokens, tensorboard
        self.shown: dict[str, str] = {}
        self.writer: Any = None
        self.bar: Any = None

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            # Not the one of transformers: it would keep what comes after the checkpoint that a run goes on from.
            self.writer = SummaryWriter(str(self.run.path / "tensorboard"), purge_step=state.global_step + 1)
        self.bar = tqdm(total=state.max_steps, initial=state.global_step, desc="train", unit="step", smoothing=0.1)
        self.busy, self.since, self.since_step = 0.0, time.perf_counter(), state.global_step

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # Validation and saving, which come between two steps, take no part in the speed of training.
        self.busy += time.perf_counter() - self.since
        self.since = time.perf_counter()
        self.bar.update(state.global_step - self.bar.n)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        logs = {k: v for k, v in (logs or {}).items() if k != "epoch" and math.isfinite(v)}
        if "train_runtime" in logs:
            return  # Trainer's summary: its figures are of its own dataset, which there is none of
        if "loss" in logs:
            steps = state.global_step - self.since_step
            logs["tokens_per_second"] = round(self.tokens * steps / max(self.busy, 1e-9), 1)
            self.busy, self.since_step = 0.0, state.global_step
            self.shown["loss"] = f"{logs['loss']:.3f}"
            self.shown["tok/s"] = f"{logs['tokens_per_second']:,.0f}"
        if "eval_loss" in logs:
            self.shown["valid"] = f"{logs['eval_loss']:.3f}"
        self.run.append_log({"step": state.global_step, **logs})
        for name, value in logs.items() if self.writer else ():
            self.writer.add_scalar(name, value, state.global_step)
        self.bar.set_postfix(self.shown, refresh=False)
        self.since = time.perf_counter()

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self.since = time.perf_counter()
        if self.writer:
            self.writer.flush()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the bar and the TensorBoard file, also where training broke off."""
        if self.writer is not None:
            self.writer.close()
        if self.bar is not None:
            self.bar.close()


def reading_bar(name: str) -> Any:
    """A bar for the tokenizing of a source, told in characters."""
    return tqdm(desc=f"tokens of {Path(name).name}", unit="char", unit_scale=True, leave=False)
