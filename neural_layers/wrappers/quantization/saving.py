"""A quantized model as a folder: the same bits, and so the same outputs, when it is loaded."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from neural_layers.errors import InputError
from neural_layers.files import replacing, save_json
from neural_layers.wrappers.modules import replace_module
from neural_layers.wrappers.quantization.bitsandbytes import bitsandbytes_config
from neural_layers.wrappers.quantization.plan import Plan
from neural_layers.wrappers.quantization.quantize import METHOD, record
from neural_layers.wrappers.quantization.restoring import (
    WEIGHTS,
    plan_of_bitsandbytes,
    read_json,
    read_tensors,
    restored_layers,
    weight_files,
)

PLAN = "quantization.json"
FORMATS = (METHOD, "bitsandbytes")
# What loads a folder without a model: `neural_layers.models.quantized` puts itself here, as it lies above this package.
loaders: list[Callable[[Path, Plan], nn.Module]] = []


def save_quantized(model: nn.Module, folder: str | Path, format: str = METHOD) -> Path:
    """Write a quantized model to `folder`: model.safetensors and quantization.json, and of a transformers model
    config.json too, so that `from_pretrained` loads it.

    format: "neural_layers", or "bitsandbytes" for a transformers model in nf4 or fp4 (embeddings left as they are),
            which transformers then loads with bitsandbytes
    Each file is written beside and renamed, the plan last. Returns the folder. Raises ValueError for a model that is
    not quantized, is prepared for int8_qat and not converted, or does not fit the format.
    """
    folder, plan = Path(folder), Plan.of(model)
    if format not in FORMATS:
        raise ValueError(f"format={format!r} must be one of {', '.join(map(repr, FORMATS))}")
    if not plan.layers:
        raise ValueError("no layer of the model is quantized; call quantize(model, scheme) first")
    prepared = [name for name, entry in plan.layers.items() if entry["scheme"] == "int8_qat"]
    if prepared:
        raise ValueError(f"{prepared[0]!r} is prepared for int8_qat; call convert_qat(model) first")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; give a folder")
    other = bitsandbytes_config(model, plan) if format == "bitsandbytes" else None
    folder.mkdir(parents=True, exist_ok=True)
    state, same = _state(model)
    _write(state, folder / WEIGHTS)
    if callable(getattr(model, "save_pretrained", None)):
        record(model)
        _write_config(model, folder, other)
    if other is None:
        content = {"model": type(model).__name__, "layers": plan.layers, "dtypes": _dtypes(model, plan), "same": same}
        save_json(folder / PLAN, content)
    else:
        # A plan of an earlier save would be taken for that of these weights.
        (folder / PLAN).unlink(missing_ok=True)
    return folder


def load_quantized(folder: str | Path, model: nn.Module | None = None) -> nn.Module:
    """The model that `save_quantized` or `save_pretrained` wrote to `folder`, or bitsandbytes in 4 bits: the same bits.

    model: a float model of the architecture, which is filled in place and returned (in its mode, training or not), its
           parameters and lookups in the dtypes that they were saved in. None: a transformers model is built after
           config.json, in evaluation mode; for that import `neural_layers.models.quantized` (the model packages do).
    Raises InputError for a folder that is incomplete, broken, or of another model; `model` is then unchanged.
    """
    folder = Path(folder)
    files = weight_files(folder)
    tensors = read_tensors(files)
    plan, same, dtypes = _saved_plan(folder, tensors)
    if model is None:
        if not loaders:
            raise InputError("without a model, import neural_layers.models.quantized first, or give the float model")
        return loaders[0](folder, plan)
    taken = tuple(f"{name}." for name in plan.layers)
    made = restored_layers(model, plan, tensors)
    for name, layer in made.items():
        if hasattr(layer, "dtype") and name in dtypes:
            layer.dtype = dtypes[name]  # type: ignore[assignment]
    rest = {name: tensor for name, tensor in tensors.items() if not name.startswith(taken)}
    targets = _targets(model, plan, rest, same, folder)
    modules = dict(model.named_modules(remove_duplicate=False))
    for target, tensor in targets:
        target.data = tensor.to(target.device)
    places = {id(modules[name]): layer for name, layer in made.items()}
    for name, module in modules.items():
        if id(module) in places:
            replace_module(model, name, places[id(module)].to(_device(module)))
    record(model)
    return model


def _saved_plan(folder: Path, tensors: dict[str, Tensor]) -> tuple[Plan, dict[str, str], dict[str, torch.dtype]]:
    """The plan in a folder, the names of tensors that were written under another name, the dtypes of lookups."""
    try:
        if (folder / PLAN).is_file():
            content = read_json(folder / PLAN)
            dtypes = {name: _dtype(told) for name, told in content.get("dtypes", {}).items()}
            return Plan(content["layers"]), dict(content.get("same", {})), dtypes
        config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
        told = config.get("quantization_config") or {}
        if told.get("quant_method") == METHOD:
            plan, whole = Plan(told["layers"]), config.get("dtype")
            return plan, {}, {} if whole is None else dict.fromkeys(plan.layers, _dtype(whole))
    except (AttributeError, KeyError, TypeError, ValueError) as problem:
        raise InputError(f"the plan in {folder} cannot be used: {problem!r}; save the model again") from problem
    plan = plan_of_bitsandbytes(tensors)
    if not plan.layers:
        method = told.get("quant_method", "none")
        raise InputError(
            f"{folder} holds no quantized model (no {PLAN}, quant_method {method!r}); give a folder of save_quantized, "
            "or of bitsandbytes in 4 bits"
        )
    return plan, {}, {}


def _dtypes(model: nn.Module, plan: Plan) -> dict[str, str]:
    """The dtypes of what the quantized embeddings give, which no tensor of theirs has."""
    layers = {name: getattr(model.get_submodule(name), "dtype", None) for name in plan.layers}
    return {name: str(dtype).removeprefix("torch.") for name, dtype in layers.items() if dtype is not None}


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"{name!r} is no floating-point dtype")
    return found


def _targets(
    model: nn.Module, plan: Plan, rest: dict[str, Tensor], same: dict[str, str], folder: Path
) -> list[tuple[Tensor, Tensor]]:
    """Each plain parameter and buffer of the model with the saved tensor for it, once all fit."""
    modules = dict(model.named_modules(remove_duplicate=False))
    replaced = {id(modules[name]) for name in plan.layers}
    names = [name for name, module in modules.items() if id(module) in replaced]
    starts = tuple(f"{name}." for name in names)
    own = {name: t for name, t in model.state_dict(keep_vars=True).items() if not name.startswith(starts)}
    saved = {name: rest[same.get(name, name)] for name in [*rest, *same] if same.get(name, name) in rest}
    # A weight that the model ties is in the file under one of its names.
    under = {id(own[name]): tensor for name, tensor in saved.items() if name in own}
    for name, tensor in own.items():
        if id(tensor) not in under:
            raise InputError(f"{name} is missing in {folder}; the folder is of another model, or incomplete")
        if under[id(tensor)].shape != tensor.shape:
            shapes = f"{tuple(under[id(tensor)].shape)}; expected {tuple(tensor.shape)}"
            raise InputError(f"{name} in {folder} has shape {shapes}; the folder is of another model")
        if tensor.is_meta:
            raise InputError(f"{name} of the model lies on the meta device; give a model with weights")
    for name in rest:
        if name not in own and name not in same.values():
            raise InputError(f"{name} in {folder} is not known to the model; the folder is of another model")
    unique = {id(tensor): tensor for tensor in own.values()}
    return [(tensor, under[key]) for key, tensor in unique.items()]


def _device(module: nn.Module) -> torch.device:
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight.device


def _state(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The tensors to write, each memory once, and of every name left out the one that stands for it."""
    tensors: dict[str, Tensor] = {}
    same: dict[str, str] = {}
    first: dict[object, str] = {}
    again = _later_names(model)
    for name, tensor in model.state_dict().items():
        other = next((other for other in again if name.startswith(f"{other}.")), None)
        if other is not None:
            same[name] = again[other] + name.removeprefix(other)
            continue
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} in the state dict is a {type(tensor).__name__}; only tensors can be saved")
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype) if tensor.numel() else name
        if place in first:
            same[name] = first[place]
        else:
            first[place] = name
            tensors[name] = tensor.detach().contiguous()
    storages = [t.untyped_storage().data_ptr() for t in tensors.values() if t.numel()]
    if len(set(storages)) < len(storages):
        # Views of one memory that are not the same: safetensors takes none of them.
        tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    return tensors, same


def _later_names(model: nn.Module) -> dict[str, str]:
    """Of each module that stands in several places, the later names, with the first one."""
    first: dict[int, str] = {}
    every = [(name, first.setdefault(id(m), name)) for name, m in model.named_modules(remove_duplicate=False)]
    return {name: own for name, own in every if name != own}


def _write(tensors: dict[str, Tensor], path: Path) -> None:
    from safetensors.torch import save_file

    with replacing(path) as beside:
        save_file(tensors, beside, metadata={"format": "pt"})


def _write_config(model: Any, folder: Path, other: dict[str, Any] | None) -> None:
    """config.json, as save_pretrained writes it, with the quantization of `other` in place of its own."""
    config = model.config.to_dict()
    config |= {"architectures": [type(model).__name__], "dtype": str(model.dtype).removeprefix("torch.")}
    if other is not None:
        config["quantization_config"] = other
    save_json(folder / "config.json", _plain(config))
    own = getattr(model, "generation_config", None)
    if own is not None and model.can_generate():
        save_json(folder / "generation_config.json", _plain(own.to_diff_dict()))


def _plain(value: Any) -> Any:
    """Without what JSON has not: dtypes by name, keys as text."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return str(value).removeprefix("torch.") if isinstance(value, torch.dtype) else value
