"""A trainer that trains for a while and then is as it was."""

import copy
from collections import defaultdict, deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer

from neural_layers.distill.checkpoint import random_state, restore_random_state

_PLAIN = (int, float, str, bool, type(None), dict, list, deque, defaultdict, Tensor)


@contextmanager
def as_it_was(trainer: Trainer) -> Iterator[None]:
    """Whatever the block trains, weights and buffers, gradients, optimiser, schedule, random state, modes and the
    trainer's own counters are afterwards what they were before, bit for bit, also where the block raises."""
    model: Any = trainer.model
    tensors = _tensors(trainer, model)
    values = [(tensor, tensor.detach().clone(), tensor.grad) for tensor in tensors]
    modes = [(module, module.training) for module in model.modules()]
    optimizer, schedule = trainer.optimizer, trainer.lr_scheduler
    kept = [(part, copy.deepcopy(part.state_dict())) for part in (optimizer, schedule) if part is not None]
    own = {name: copy.deepcopy(value) for name, value in vars(trainer).items() if type(value) in _PLAIN}
    state, control = copy.deepcopy((trainer.state, trainer.control))
    prepared = {name: list(getattr(trainer.accelerator, name)) for name in ("_dataloaders", "_optimizers", "_models")}
    drawn = random_state()
    try:
        for tensor in tensors:
            tensor.grad = None
        yield
    finally:
        with torch.no_grad():
            for tensor, value, gradient in values:
                tensor.copy_(value)
                tensor.grad = gradient
        for module, mode in modes:
            module.training = mode
        trainer.optimizer, trainer.lr_scheduler = optimizer, schedule
        for part, content in kept:
            part.load_state_dict(content)
        for name in set(vars(trainer)) - set(own):
            if type(vars(trainer)[name]) in _PLAIN:
                delattr(trainer, name)
        vars(trainer).update(own)
        trainer.state, trainer.control = state, control
        for name, found in prepared.items():
            setattr(trainer.accelerator, name, found)
        restore_random_state(drawn)


def _tensors(trainer: Trainer, model: torch.nn.Module) -> list[Tensor]:
    """Every tensor that a step may change: of the model, of the optimiser's groups, of a loss with weights."""
    found = [*model.parameters(), *model.buffers()]
    for module in (value for value in vars(trainer).values() if isinstance(value, torch.nn.Module)):
        found += [p for p in module.parameters() if p.requires_grad]
        found += list(module.buffers())
    if trainer.optimizer is not None:
        found += [p for group in trainer.optimizer.param_groups for p in group["params"]]
    return list({id(tensor): tensor for tensor in found}.values())
