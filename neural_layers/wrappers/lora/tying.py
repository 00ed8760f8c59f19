"""Weights that several modules share."""

from typing import Any

from torch import Tensor, nn

from neural_layers.wrappers.lora.layer import LoRALayer
from neural_layers.wrappers.lora.targets import outermost


def holders(model: nn.Module, layer: LoRALayer) -> list[str]:
    """The names of the other modules that compute with the memory of a wrapped layer's weight."""
    own = _memory(layer)
    found = []
    for names, module in outermost(model):
        if module is not layer and own & _memory(module, recurse=isinstance(module, LoRALayer)):
            found.append(names[0])
    return found


def _memory(module: nn.Module, *, recurse: bool = True) -> set[int]:
    """Where the weights of a module, or of the layer that it wraps, lie."""
    base: Any = module.base_layer if recurse and isinstance(module, LoRALayer) else module
    tensors: list[Tensor | None] = [base._parameters.get("weight"), base._buffers.get("weight")]
    return {tensor.data_ptr() for tensor in tensors if tensor is not None and tensor.numel()} - {0}


def set_tied(model: Any, tied: bool) -> None:
    """Say in a transformers model's config whether head and embedding share their weight, so that what is saved loads
    back as it is. Another model has no such place."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "tie_word_embeddings"):
        return
    config.tie_word_embeddings = tied
    keys = list(getattr(model, "_tied_weights_keys", None) or {})
    # Read when the model is saved: a key that is said to be tied is left out of the file.
    if getattr(model, "_keys_to_ignore_on_save", None) is not None:
        model._keys_to_ignore_on_save = [*keys] if tied else []
    if hasattr(model, "all_tied_weights_keys"):
        model.all_tied_weights_keys = model.get_expanded_tied_weights_keys(all_submodels=True) if tied else {}


def part_quantized(model: Any) -> None:
    """Let quantized layers of which the other half of a shared weight is no longer in the model be saved with bits of
    their own."""
    from neural_layers.wrappers.quantization.plan import Plan

    inside = set(map(id, model.modules()))
    alone: list[Any] = [m for m in model.modules() if any(id(o) not in inside for o in getattr(m, "_shared_with", ()))]
    for module in alone:
        module._shared_with = ()
    noted: Any = getattr(getattr(model, "config", None), "quantization_config", None)
    if alone and isinstance(noted, dict):
        model.config.quantization_config = {**noted, "layers": Plan.of(model).layers}
