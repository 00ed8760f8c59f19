"""Quantized layers out of the tensors of a checkpoint, built for the plain layers of a model."""

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from neural_layers.errors import InputError
from neural_layers.kernels.four_bit_state import from_state
from neural_layers.wrappers.modules import unmatched_error
from neural_layers.wrappers.quantization.formats import Format, share
from neural_layers.wrappers.quantization.plan import Plan
from neural_layers.wrappers.quantization.selection import obstacle

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
_HEADER = ".quant_state.bitsandbytes__"


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a folder, those that an index names included. Raises InputError where one is missing."""
    if not folder.is_dir():
        raise InputError(f"there is no folder {folder}; give one that a quantized model was saved to")
    names = [WEIGHTS]
    if not (folder / WEIGHTS).is_file() and (folder / INDEX).is_file():
        names = sorted(set(read_json(folder / INDEX)["weight_map"].values()))
    for name in names:
        if not (folder / name).is_file():
            raise InputError(f"there is no {name} in {folder}; weights are read from safetensors alone")
    return [folder / name for name in names]


def read_json(path: Path) -> Any:
    """The content of a JSON file. Raises InputError for one that cannot be read."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as problem:
        raise InputError(f"{path} cannot be read: {problem}; save the model again") from problem


def read_tensors(files: Iterable[Path | str], layers: Iterable[str] | None = None) -> dict[str, Tensor]:
    """The tensors of safetensors files: all of them, or those of some layers. Raises InputError for a broken file."""
    from safetensors import SafetensorError, safe_open

    starts = None if layers is None else tuple(f"{layer}." for layer in layers)
    tensors: dict[str, Tensor] = {}
    for path in files:
        try:
            with safe_open(path, framework="pt") as file:
                names = [name for name in file.keys() if starts is None or name.startswith(starts)]  # noqa: SIM118
                tensors |= {name: file.get_tensor(name) for name in names}
        except (SafetensorError, OSError) as problem:
            raise InputError(f"{path} cannot be read ({problem}); it is cut off or no safetensors file") from problem
    return tensors


def plan_of_bitsandbytes(tensors: Mapping[str, Tensor]) -> Plan:
    """The plan of a checkpoint that bitsandbytes wrote, read off its tensors. Raises InputError for broken ones."""
    layers: dict[str, dict[str, Any]] = {}
    for key in tensors:
        weight, mark, _ = key.partition(_HEADER)
        if not mark:
            continue
        if weight not in tensors:
            raise InputError(f"{key} has no {weight} beside it; the checkpoint is not complete")
        start = f"{weight}."
        state = {name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)}
        try:
            record = from_state(tensors[weight], state)
        except (TypeError, ValueError) as problem:
            raise InputError(f"{weight}: {problem}") from problem
        nested = record.nested_absmax is not None
        layers[weight.removesuffix(".weight")] = Format(record.quant_type, record.block_size, nested).entry()
    return Plan(layers)


def restored_layers(model: nn.Module, plan: Plan, tensors: Mapping[str, Tensor]) -> dict[str, nn.Module]:
    """The quantized layers of `plan` with the bits in `tensors`; `model` has the plain layers, and stays as it is.

    Raises InputError for a layer that the model has not, or has in another kind or size, and for missing tensors.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    made: dict[str, nn.Module] = {}
    for name in sorted(plan.layers, key=lambda name: plan.shares(name) is not None):
        if name not in modules:
            raise InputError(f"the saved layer {unmatched_error([name], modules)}; the folder is of another model")
        why = obstacle(modules[name])
        if why is not None:
            raise InputError(f"the saved layer {name!r} cannot be put into this model: {why}")
        layer = plan.format(name).of(_empty(modules[name]))
        owner = plan.shares(name)
        try:
            if owner is not None:
                layer.to_empty(device=made[owner].weight.device, recurse=False)  # type: ignore[arg-type]
                share(layer, made[owner])
            start = f"{name}."
            state = {key.removeprefix(start): value for key, value in tensors.items() if key.startswith(start)}
            layer.load_state_dict(state, assign=True)
        except (RuntimeError, ValueError, TypeError) as problem:
            said = " ".join(str(problem).split())
            raise InputError(f"the saved layer {name!r} does not fit the model: {said}") from problem
        made[name] = layer.train(modules[name].training)
    return made


def _empty(layer: nn.Module) -> nn.Module:
    """A plain layer of the same sizes on the meta device."""
    if isinstance(layer, nn.Embedding):
        sizes = (layer.num_embeddings, layer.embedding_dim, layer.padding_idx)
        return nn.Embedding(*sizes, device="meta", dtype=layer.weight.dtype)
    assert isinstance(layer, nn.Linear)
    sizes_of_linear = (layer.in_features, layer.out_features, layer.bias is not None)
    return nn.Linear(*sizes_of_linear, device="meta", dtype=layer.weight.dtype)
