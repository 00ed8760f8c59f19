"""Norms of gradients, weights and updates while a model trains, by the kind of layer that they belong to."""

import re
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

# The first that fits a parameter's name counts. A norm inside a mixer is a norm.
_GROUPS = {
    "norms": r"norm|(^|\.)ln_",
    "embeddings": r"embed|(^|\.)(shared|wte|wpe)\.",
    "head": r"lm_head|classifier|(^|\.)(score|pooler|head)\.",
    "mixers": r"mixer|attention|attn|mamba|ssm",
    "feed_forward": r"feed_forward|mlp|ffn",
}


def group_of(name: str) -> str:
    """The group of a parameter: norms, embeddings, head, mixers, feed_forward; for any other its module, at most three
    names deep and without the numbers of layers."""
    for group, pattern in _GROUPS.items():
        if re.search(pattern, name):
            return group
    parts = [part for part in name.split(".")[:-1] if not part.isdigit()]
    return ".".join(parts[:3]) or name


class StatisticsCallback(TrainerCallback):
    """Every `every` steps logs, for each group g of parameters (`group_of`),

        grad_norm/g    ‖∇‖₂, as the optimiser gets it: after clipping
        param_norm/g   ‖θ‖₂ before the step
        update_ratio/g ‖Δθ‖₂ / ‖θ‖₂ of the step; about 1e-3 is usual, 0 is a layer that learns nothing

    through `trainer.log`, so that the trackers and the run's log have them. Nothing is drawn and nothing written to the
    model: its weights become the same bits. In a measured step the weights are kept twice.

    trainer: set by `add_statistics`. Raises ValueError for an `every` below 1.
    """

    def __init__(self, every: int) -> None:
        if every < 1:
            raise ValueError(f"every={every} must be at least 1")
        self.every = every
        self.trainer: Trainer | None = None
        self._before: dict[str, Tensor] = {}
        self._gradients: dict[str, float] = {}

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if (state.global_step + 1) % self.every:
            return
        parameters = _parameters(kwargs["model"])
        self._gradients = _norms({n: p.grad.detach() for n, p in parameters.items() if p.grad is not None})
        self._before = {name: parameter.detach().clone() for name, parameter in parameters.items()}

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if not self._before:
            return
        now = _parameters(kwargs["model"])
        weights = _norms(self._before)
        updates = _norms({name: now[name].detach() - before for name, before in self._before.items()})
        self._before = {}
        logs = {f"grad_norm/{group}": norm for group, norm in self._gradients.items()}
        logs |= {f"param_norm/{group}": norm for group, norm in weights.items()}
        logs |= {f"update_ratio/{group}": updates[group] / norm for group, norm in weights.items() if norm}
        assert self.trainer is not None
        is_due = control.should_log  # the loss of this step: logging anything else would count as that
        self.trainer.log(logs)
        control.should_log = is_due


def add_statistics(trainer: Trainer, every: int | None) -> None:
    """Let `trainer` log statistics every so many steps; None for not."""
    if every is not None:
        callback = StatisticsCallback(every)
        callback.trainer = trainer
        trainer.add_callback(callback)


def _parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Those that are trained. A wrapper such as DDP puts its own name in front."""
    found = model.named_parameters()
    return {name.removeprefix("module."): parameter for name, parameter in found if parameter.requires_grad}


def _norms(tensors: dict[str, Tensor]) -> dict[str, float]:
    """√Σ‖t‖₂² over the tensors of each group, in float64; one wait for the device."""
    if not tensors:
        return {}
    groups = dict.fromkeys(map(group_of, tensors))
    sums = {group: torch.zeros((), dtype=torch.float64) for group in groups}
    norms = [torch.linalg.vector_norm(t if t.dtype == torch.float64 else t.float()) for t in tensors.values()]
    # A tensor that is split over processes (DTensor) is summed over them.
    whole = torch.stack([n.full_tensor() if hasattr(n, "full_tensor") else n for n in norms]).double().cpu()
    for name, norm in zip(tensors, whole, strict=True):
        sums[group_of(name)] += norm**2
    return {group: float(total.sqrt()) for group, total in sums.items()}
