"""Parameters, gradients and optimiser state split over processes (FSDP2, `fully_shard`)."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

_WHOLE = StateDictOptions(full_state_dict=True, cpu_offload=True)


def shard(model: Any, device: torch.device) -> None:
    """Split the model's parameters over all processes: each layer by itself, then what is outside the layers.

    transformers' own `fsdp` option silently runs DDP on the CPU. Call it before the optimiser is made.
    """
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)


def whole_weights(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with whole tensors, on the first process (empty on the others). All processes must call it.

    Of tied tensors the first alone, as a model is saved.
    """
    first = {name for name, _ in model.named_parameters()}
    tied = {name for name, _ in model.named_parameters(remove_duplicate=False)} - first
    whole: dict[str, Any] = get_model_state_dict(model, options=_WHOLE)
    return {name: value for name, value in whole.items() if name not in tied}


def load_sharded_weights(model: nn.Module, weights: dict[str, Tensor]) -> None:
    """Load whole tensors, which every process has, into a model that is split."""
    whole: dict[str, Any] = dict(weights)
    set_model_state_dict(model, whole, options=StateDictOptions(full_state_dict=True, strict=False))


def whole_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The optimiser's state dict by names and with whole tensors, on the first process. All must call it."""
    return get_optimizer_state_dict(model, optimizer, options=_WHOLE)


def load_sharded_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load what `whole_optimizer` returned; every process has the whole of it."""
    set_optimizer_state_dict(model, optimizer, state, options=StateDictOptions(full_state_dict=True))
