"""Masks that hold pruned weights at zero, beside the weights and without another name for them.

A mask is a buffer `weight_mask` of the layer, true where a weight counts, and stays out of checkpoints: the zeros
themselves are saved, under the names that the weights always had. While it is held

- the gradient of a pruned weight is zero (so that clipping measures the gradient of the pruned model), and
- after each step of whatever `torch.optim.Optimizer` the pruned weights are set to zero again, whatever momentum,
  weight decay or an update that mixes rows (Muon) have made of them.

Both are bound to the parameter. A copy of the layer (deepcopy) or another parameter in its place is bound when the
layer is next called.
"""

import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

MASK = "weight_mask"


@dataclass
class _Hold:
    module: "weakref.ref[nn.Module]"
    gradient: RemovableHandle | None


_HELD: Any = WeakTensorKeyDictionary()  # weight → _Hold
_STEPS: list[RemovableHandle] = []


def hold(module: nn.Module, mask: Tensor) -> None:
    """Set the weights of `module` to zero where `mask` (bool, of the weight's shape) is false, and keep them there."""
    weight: Any = module.weight
    mask = mask.to(weight.device)
    if MASK in module._buffers:
        module._buffers[MASK] = mask
    else:
        module.register_buffer(MASK, mask, persistent=False)
        module.register_forward_pre_hook(_watch)
    _bind(module)
    _zero(module)


def release(module: nn.Module) -> None:
    """Forget the mask of `module`, if it has one. The zeros stay, and training may fill them."""
    if module._buffers.pop(MASK, None) is None:
        return
    module._non_persistent_buffers_set.discard(MASK)
    for key, hook in list(module._forward_pre_hooks.items()):
        if hook is _watch:
            del module._forward_pre_hooks[key]
    held = _HELD.pop(module.weight, None)
    if held is not None and held.gradient is not None:
        held.gradient.remove()


def mask_of(module: nn.Module) -> Tensor | None:
    """The mask that `module` holds: bool, true where a weight counts; None for none."""
    return module._buffers.get(MASK)


def masked(model: nn.Module) -> Iterator[tuple[str, Any, Tensor]]:
    """Name, module and mask of every layer that holds one."""
    for name, module in model.named_modules():
        mask = mask_of(module)
        if mask is not None:
            yield name, module, mask


def masks(model: nn.Module) -> dict[str, Tensor]:
    """The masks of all layers that hold one, by the layer's name; bool, true where a weight counts."""
    return {name: mask for name, _, mask in masked(model)}


def apply_masks(model: nn.Module) -> int:
    """Set the pruned weights of all layers to zero, and return how many were not.

    For weights that something other than an optimiser wrote: an adapter merged into them, weights loaded over them.
    """
    changed = 0
    for _, module, mask in masked(model):
        changed += int((module.weight.detach()[~mask] != 0).sum())
        _bind(module)
        _zero(module)
    return changed


def remove_masks(model: nn.Module) -> None:
    """Forget all masks. The pruned weights stay zero until something fills them."""
    for _, module, _ in list(masked(model)):
        release(module)


def _zero(module: Any) -> None:
    # .data: no version of the tensor that a graph has saved is meant to be outdated by writing zeros over zeros.
    module.weight.data.masked_fill_(~module._buffers[MASK], 0)


def _bind(module: nn.Module) -> bool:
    """Bind the mask to the parameter that is the weight now; whether it was not yet bound."""
    if not _STEPS:
        _STEPS.append(register_optimizer_step_post_hook(_after_step))
    weight: Any = module.weight
    held = _HELD.get(weight)
    is_new = held is None or held.module() is not module
    if is_new:
        if held is not None and held.gradient is not None:
            held.gradient.remove()
        held = _HELD[weight] = _Hold(weakref.ref(module), None)
    if held.gradient is None and weight.requires_grad and weight.is_leaf:
        reference = held.module
        held.gradient = weight.register_hook(lambda gradient: _masked_gradient(reference(), gradient))
    return is_new


def _masked_gradient(module: nn.Module | None, gradient: Tensor) -> Tensor:
    mask = None if module is None else mask_of(module)
    # A sparse gradient (of an embedding) stays as it is: what it fills is set to zero behind the step.
    return gradient if mask is None or gradient.layout != torch.strided else gradient.masked_fill(~mask, 0)


def _watch(module: nn.Module, inputs: Any) -> None:
    # A module that took this one's place, quantized, may have taken its hooks too, and has no mask.
    if mask_of(module) is not None and not torch.compiler.is_compiling() and _bind(module):
        _zero(module)


def _after_step(optimizer: Any, args: Any, kwargs: Any) -> None:
    if not _HELD:
        return
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            held = _HELD.get(parameter)
            module = None if held is None else held.module()
            if module is not None and mask_of(module) is not None and module.weight is parameter:
                _zero(module)
