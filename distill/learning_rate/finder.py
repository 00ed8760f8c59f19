"""The range test on a Trainer, which is left as it was found."""

import math
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn
from transformers import Trainer

from neural_layers.distill.learning_rate.curve import DIVERGED, LearningRateCurve, exponential_rates, smooth
from neural_layers.distill.learning_rate.restoring import as_it_was

DEFAULT_STEPS = 100


def find_learning_rate(
    trainer: Trainer, low: float = 1e-7, high: float = 1.0, steps: int = DEFAULT_STEPS
) -> LearningRateCurve:
    """Train for up to `steps` steps at rates that grow from `low` to `high`, and suggest one (arXiv 1506.01186).

    Each step is one of the trainer's own: its batches, its accumulation, its loss, its clipping, its optimiser with
    this rate for all groups (those with a rate of their own keep the ratio). It ends early where the smoothed loss is
    4 times its best or a loss is not finite. Afterwards weights, optimiser, schedule, random state and the trainer's
    own state are what they were, bit for bit.
    The suggestion is where the smoothed loss falls steepest; a third to a tenth of it is the careful choice.
    Raises: ValueError for rates that do not grow, fewer than 10 steps, float16 (whose scaler would have to learn its
    scale anew; take bfloat16 or float32 for the test), several processes, and fewer than three finite losses.
    """
    if not 0 < low < high < math.inf:
        raise ValueError(f"low={low}, high={high}: rates must grow from above 0; give low < high")
    if steps < 10:
        raise ValueError(f"steps={steps} are too few for a curve; give at least 10")
    if trainer.args.fp16:
        raise ValueError("fp16=True: float16's scaler cannot be put back; run the test with bf16=True or in float32")
    if trainer.args.world_size > 1:
        raise ValueError(f"{trainer.args.world_size} processes: run the test in one, with the whole batch accumulated")
    with as_it_was(trainer):
        return _range_test(trainer, exponential_rates(low, high, steps))


def _range_test(trainer: Trainer, rates: list[float]) -> LearningRateCurve:
    model: Any = trainer.model
    optimizer = trainer.optimizer
    if optimizer is None:
        optimizer = trainer.create_optimizer()
    shares = [group["lr"] for group in optimizer.param_groups]
    largest = max(shares) or 1.0
    batches = _endless(trainer)
    losses, diverged = list[float](), False
    for rate in rates:
        for group, share in zip(optimizer.param_groups, shares, strict=True):
            group["lr"] = rate * (share / largest if max(shares) else 1.0)
        loss = _step(trainer, model, optimizer, batches)
        if not math.isfinite(loss):
            diverged = True
            break
        losses.append(loss)
        smoothed = smooth(losses)
        if len(losses) >= 3 and smoothed[-1] > DIVERGED * min(smoothed):
            diverged = True
            break
    if len(losses) < 3:
        raise ValueError(f"only {len(losses)} steps from a rate of {rates[0]:g} had a finite loss; begin lower")
    return LearningRateCurve.of(rates[: len(losses)], losses, diverged)


def _step(trainer: Trainer, model: nn.Module, optimizer: torch.optim.Optimizer, batches: Iterator[Any]) -> float:
    """One optimiser step; its loss, infinity where the trainer refuses it as not finite."""
    trainer.current_gradient_accumulation_steps = trainer.args.gradient_accumulation_steps
    samples, items = trainer.get_batch_samples(batches, trainer.args.gradient_accumulation_steps, trainer.args.device)
    optimizer.zero_grad()
    try:
        loss = sum(trainer.training_step(model, inputs, items).item() for inputs in samples)
        if trainer.args.max_grad_norm:
            trainer._clip_grad_norm(model)
    except FloatingPointError:
        return math.inf
    if math.isfinite(loss):
        # The step's number stays: what goes by it (schedules of the loss) is tested as it is at this point.
        optimizer.step()
    return loss


def _endless(trainer: Trainer) -> Iterator[Any]:
    """The trainer's batches, from the beginning again where they end."""
    while True:
        count = 0
        for count, batch in enumerate(trainer.get_train_dataloader(), start=1):  # noqa: B007
            yield batch
        if not count:
            raise ValueError("the trainer's training data has no batch; give it data")
