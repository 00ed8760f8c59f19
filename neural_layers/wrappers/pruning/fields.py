"""The config of a model whose units are removed."""

import copy
from typing import Any

import torch
from torch import nn

from neural_layers.wrappers.pruning.plan import Kept
from neural_layers.wrappers.pruning.units import Units


def changed_config(
    model: nn.Module, resolved: list[tuple[Units, Kept]], sizes: dict[tuple[int, str, int], int]
) -> dict[str, Any]:
    """The fields of the model's config that the removal changes, with their values; empty without a config.

    sizes: by module id, parameter and dimension, the new size
    Raises ValueError where no config of this kind describes the shrunken model: a model built of it is compared, shape
    by shape, on the meta device.
    """
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_dict"):
        return {}
    wrapped = next((name for name, _ in model.named_modules() if name.endswith(".base_layer")), None)
    if wrapped is not None:
        raise ValueError(
            f"{wrapped.removesuffix('.base_layer')} carries an adapter, which no config describes; fold_lora or "
            "remove_adapter, shrink, and train an adapter of the new size"
        )
    changes: dict[str, Any] = {}
    for units, kept in resolved:
        fields = units.fields(len(kept.kept))
        if units.per_layer is not None:
            layers = changes.setdefault(units.per_layer, copy.deepcopy(getattr(config, units.per_layer, None) or {}))
            index = _layer_index(units.name)
            layers[index] = {**layers.get(index, {}), **fields}
            continue
        for name, value in fields.items():
            if changes.setdefault(name, value) != value:
                raise ValueError(
                    f"{name} would be {changes[name]} in one layer and {value} in {units.name}, and the config has one "
                    "for all; remove the same share everywhere"
                )
    _check(model, config, changes, sizes)
    return changes


def _layer_index(name: str) -> str:
    return next((part for part in name.split(".") if part.isdecimal()), "0")


def _check(model: nn.Module, config: Any, changes: dict[str, Any], sizes: dict[tuple[int, str, int], int]) -> None:
    told = ", ".join(f"{name}={value}" for name, value in changes.items())
    problem = None
    try:
        # By way of a dict, as the config will be read from its file.
        fresh = type(config).from_dict({**copy.deepcopy(config.to_dict()), **copy.deepcopy(changes)})
        with torch.device("meta"):
            built = dict(type(model)(fresh).named_parameters())
    except Exception as error:  # what a config raises is its own: transformers' is no ValueError
        problem = " ".join(str(error).split())
    if problem is None:
        for name, shape in _shapes(model, sizes).items():
            found = tuple(built[name].shape) if name in built else None
            if found != shape:
                problem = f"{name} would have shape {found}, and is left with {shape}"
                break
    if problem is not None:
        raise ValueError(
            f"{type(config).__name__} cannot describe the shrunken model by {told} ({problem}): it has one width for "
            "all layers, so remove the same share in each, or shrink a part of the model that has no config of its own"
        )


def _shapes(model: nn.Module, sizes: dict[tuple[int, str, int], int]) -> dict[str, tuple[int, ...]]:
    shapes = {}
    for name, parameter in model.named_parameters():
        parent, _, own = name.rpartition(".")
        owner = model.get_submodule(parent)
        shapes[name] = tuple(sizes.get((id(owner), own, dim), size) for dim, size in enumerate(parameter.shape))
    return shapes
