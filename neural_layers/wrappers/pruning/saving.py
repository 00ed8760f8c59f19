"""Masks of a model that was saved and loaded.

What is saved are the weights with their zeros, under their usual names: any program reads them. For the masks there
are two ways back: `restore_masks` takes the zeros for them, `load_masks` a file of one bit for each weight, which also
knows of weights that are zero and not pruned.
"""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from neural_layers.errors import InputError, require
from neural_layers.files import replacing
from neural_layers.wrappers.modules import nearest
from neural_layers.wrappers.pruning.layers import KINDS, chosen, prunable
from neural_layers.wrappers.pruning.masks import hold, masked, remove_masks
from neural_layers.wrappers.pruning.report import PruningReport, report_of

_FORMAT = "neural_layers.pruning_masks"


def record(model: nn.Module) -> None:
    """Note in the config of a transformers model how many weights of which layers are pruned, for `restore_masks`."""
    config: Any = getattr(model, "config", None)
    if not hasattr(config, "to_dict"):
        return
    found = {_plain(name): int((~mask).sum()) for name, _, mask in masked(model)}
    if found:
        config.pruning = {"zeros": found}
    elif hasattr(config, "pruning"):
        del config.pruning


def _plain(name: str) -> str:
    """The name that a layer has without the adapter around it: it is saved under this one."""
    return name.replace(".base_layer", "")


def _by_plain_name(model: nn.Module) -> tuple[dict[str, nn.Module], dict[str, str]]:
    layers, skipped = prunable(model, tuple(KINDS))
    return {_plain(name): layer for name, layer in layers.items()}, {_plain(name): why for name, why in skipped.items()}


def unprune(model: nn.Module) -> None:
    """Forget all masks, and the note of them in the config. The pruned weights stay zero until something fills them."""
    remove_masks(model)
    record(model)


@torch.no_grad()
def restore_masks(
    model: nn.Module, *, include: Iterable[str] | None = None, kinds: Sequence[str] = ("linear",)
) -> PruningReport:
    """Hold the zeros of a pruned model that was loaded: every weight that is exactly zero counts as pruned.

    The layers are those that the model's config names; without it (a model that is none of transformers') those of
    `kinds`, or that `include` matches, which have zeros at all. Returns their sparsity. Raises InputError where the
    config names layers that there are not, or more zeros than there are (weights of another model, or trained without
    masks); ValueError where nothing is zero.
    """
    noted = getattr(getattr(model, "config", None), "pruning", None)
    if noted is not None and include is None:
        layers = _noted_layers(model, noted["zeros"])
    else:
        layers, _ = chosen(model, kinds, include, ())
        layers = {name: module for name, module in layers.items() if (module.get_parameter("weight") == 0).any()}
    if not layers:
        raise ValueError("no weight of the layers is zero: load a model that was pruned, or prune this one")
    for module in layers.values():
        hold(module, module.get_parameter("weight") != 0)
    record(model)
    return report_of(model, layers, {})


def noted_without_masks(model: nn.Module) -> list[str]:
    """The layers that the model's config notes as pruned, where no layer holds a mask."""
    noted = getattr(getattr(model, "config", None), "pruning", None) or {}
    return [] if any(True for _ in masked(model)) else list(noted.get("zeros", {}))


def _noted_layers(model: nn.Module, zeros: dict[str, int]) -> dict[str, nn.Module]:
    known, skipped = _by_plain_name(model)
    for name, count in zeros.items():
        if name in skipped:
            raise InputError(f"the zeros of {name} cannot be held: {skipped[name]}")
        if name not in known:
            raise InputError(_unknown("the config's note of pruning", name, known))
        found = int((known[name].get_parameter("weight") == 0).sum())
        if found < count:
            raise InputError(
                f"{name} has {found} zeros, and {count} of its weights were pruned: these are other weights, or they "
                "were trained without masks; load those that were pruned, or prune anew"
            )
    return {name: known[name] for name in zeros}


def save_masks(model: nn.Module, path: Path | str) -> None:
    """Write the masks of all layers to a safetensors file, one bit for each weight, the first the highest of a byte.

    The file appears whole or not at all. Raises ValueError where no layer holds a mask.
    """
    require("safetensors", extra="models")
    from safetensors.torch import save_file

    found = {_plain(name): mask for name, _, mask in masked(model)}
    if not found:
        raise ValueError("no layer holds a mask; prune the model first")
    shapes = {name: list(mask.shape) for name, mask in found.items()}
    packed = {name: torch.from_numpy(np.packbits(mask.cpu().numpy().reshape(-1))) for name, mask in found.items()}
    with replacing(Path(path)) as beside:
        save_file(packed, beside, metadata={"format": _FORMAT, "shapes": json.dumps(shapes)})


@torch.no_grad()
def load_masks(model: nn.Module, path: Path | str) -> PruningReport:
    """Hold the masks of a file of `save_masks`; weights that are pruned there become zero.

    Returns the sparsity of these layers. Raises InputError where the file is none of these, is broken, or is of another
    model (the first layer is named that is missing or of another shape); the model is then as it was.
    """
    layers, skipped = _by_plain_name(model)
    found = _read(Path(path))
    for name, mask in found.items():
        if name in skipped:
            raise InputError(f"{path} holds a mask of {name}, which cannot be pruned: {skipped[name]}")
        if name not in layers:
            raise InputError(_unknown(str(path), name, layers))
        shape = tuple(layers[name].get_parameter("weight").shape)
        if tuple(mask.shape) != shape:
            raise InputError(
                f"the mask of {name} in {path} has shape {tuple(mask.shape)}, and the weight {shape}: it is of another "
                "model"
            )
    for name, mask in found.items():
        hold(layers[name], mask)
    record(model)
    return report_of(model, {name: layers[name] for name in found}, {})


def _unknown(where: str, name: str, known: Iterable[str]) -> str:
    alike = nearest(name, known)
    told = f"; the nearest are {', '.join(alike)}" if alike else ""
    return f"{where} names the layer {name}, which this model has not: it is of another model{told}"


def _read(path: Path) -> dict[str, Tensor]:
    require("safetensors", extra="models")
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            packed = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (it is no dict)
        if metadata.get("format") != _FORMAT:
            raise InputError(f"{path} holds no masks; give a file that save_masks wrote")
        shapes: dict[str, list[int]] = json.loads(metadata["shapes"])
        return {
            name: torch.from_numpy(np.unpackbits(packed[name].numpy(), count=int(np.prod(shape))).astype(bool)).view(
                shape
            )
            for name, shape in shapes.items()
        }
    except (OSError, SafetensorError, KeyError, json.JSONDecodeError) as error:
        raise InputError(f"{path} cannot be read: {error}") from error
