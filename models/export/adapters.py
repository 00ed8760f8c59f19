"""LoRA adapters in a graph: merged into the weights, or as inputs that another adapter can take the place of.

As inputs, A (R, K) and B (N, R) of each adapted linear layer stand in the graph under PEFT's names, with the model's
adapter as their value where nothing is fed ("overridable initializers"): y = x Wᵀ + b + (x Aᵀ) Bᵀ. B holds the
adapter's scale; several adapters in use are one, side by side in R.

Letters: K inputs, N outputs, R rank.
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn

from neural_layers.errors import InputError
from neural_layers.models.export.graph import Graph
from neural_layers.wrappers.lora import LoRALinear, fold_lora
from neural_layers.wrappers.lora.layer import LoRALayer

WAYS = ("merged", "inputs")
A, B = ".lora_A.weight", ".lora_B.weight"
_FLOAT = 1


def exportable(model: nn.Module, lora: str) -> Any:
    """The model itself, or where it has adapters that are to be merged, a copy with them in its weights.

    lora: "merged" or "inputs". A weight in 4 or 8 bits is quantized again when an adapter is merged into it.
    Raises InputError for another `lora`, for "inputs" without adapters, and for adapters that no inputs can stand for.
    """
    if lora not in WAYS:
        raise InputError(f"lora={lora!r} must be one of {', '.join(map(repr, WAYS))}")
    layers = {name: module for name, module in model.named_modules() if isinstance(module, LoRALayer)}
    if lora == "inputs":
        _check_inputs(model, layers)
        return model
    if not layers:
        return model
    made = copy.deepcopy(model)
    fold_lora(made)
    return made


def _check_inputs(model: nn.Module, layers: Mapping[str, LoRALayer]) -> None:
    if not layers:
        raise InputError(f"lora='inputs' is for a model with adapters, and the {type(model).__name__} has none")
    for name, layer in layers.items():
        adapters = layer.chosen(layer.selection.weights)
        why = None
        if not isinstance(layer, LoRALinear):
            why = f"the adapter of {type(layer.base_layer).__name__} changes more than a product"
        elif layer.merged is not None or layer.selection.is_disabled or layer.selection.rows is not None:
            why = "its adapters are merged, disabled or chosen by rows"
        elif any(adapter.magnitude is not None for adapter, _ in adapters):
            why = "DoRA scales the weight itself"
        if why is not None:
            raise InputError(f"lora='inputs' cannot be for {name}: {why}; leave lora out, and the adapter is merged")


def base_of(layer: Any) -> Any:
    """What an adapter stands around, or the layer itself."""
    return layer.base_layer if isinstance(layer, LoRALinear) else layer


def with_adapters(g: Graph, x: str, y: str, layer: Any, name: str) -> str:
    """y plus what the adapters in use of the layer add: y + (x Aᵀ) Bᵀ."""
    chosen = layer.chosen(layer.selection.weights) if isinstance(layer, LoRALinear) else []
    if not chosen:
        return y
    parts = [(adapter.lora_A, adapter.lora_B * (adapter.settings.scale * weight)) for adapter, weight in chosen]
    a_RK = np.concatenate([_array(a) for a, _ in parts])
    b_NR = np.concatenate([_array(b) for _, b in parts], axis=1)
    for end, array in ((A, a_RK), (B, b_NR)):
        g.root.input(g.weight(name + end, array), _FLOAT, array.shape)
    low = g.op("MatMul", x, g.op("Transpose", name + A, perm=[1, 0]))
    return g.op("Add", y, g.op("MatMul", low, g.op("Transpose", name + B, perm=[1, 0])))


def _array(tensor: Any) -> np.ndarray:
    found: np.ndarray = tensor.detach().float().cpu().numpy()
    return found


def read_inputs(folder: str | Path, wanted: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The adapter in PEFT's files in `folder` as inputs of a graph that was exported with lora="inputs".

    wanted: shapes of the graph's inputs by name. Raises InputError for a graph without adapters, files that cannot be
    read, and an adapter of other layers, of another rank, or DoRA.
    """
    from neural_layers.wrappers.lora.peft_config import read_settings
    from neural_layers.wrappers.lora.peft_files import read_adapter

    if not wanted:
        raise InputError("this export has no adapters as inputs; export a model with adapters with lora='inputs'")
    config, tensors = read_adapter(folder)
    found = {}
    for key, tensor in tensors.items():
        name = key.removeprefix("base_model.model.")
        if name not in wanted:
            raise InputError(f"the adapter in {folder} has {name}, for which the export has no input")
        if list(tensor.shape) != list(wanted[name]):
            shapes = f"{tuple(tensor.shape)}; the export takes {tuple(wanted[name])}"
            raise InputError(f"{name} of the adapter in {folder} has shape {shapes}: adapters of one rank")
        settings = read_settings(config, name.removesuffix(A).removesuffix(B))
        found[name] = _array(tensor * settings.scale if name.endswith(B) else tensor)
    missing = sorted(wanted.keys() - found.keys())
    if missing:
        raise InputError(f"the adapter in {folder} lacks {missing[0]}, which the export takes; give one of its layers")
    return found
