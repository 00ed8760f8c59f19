"""Adapters in PEFT's files: `adapter_model.safetensors` and `adapter_config.json`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from neural_layers.errors import InputError
from neural_layers.files import replacing, save_json
from neural_layers.wrappers.lora.adapter import Adapter, Settings
from neural_layers.wrappers.lora.apply import check_known, check_new_name, covered, install, wrapper_of
from neural_layers.wrappers.lora.embedding import LoRAEmbedding
from neural_layers.wrappers.lora.layer import LoRALayer
from neural_layers.wrappers.lora.peft_config import check_config, read_settings, write_config
from neural_layers.wrappers.lora.report import CoverageReport, coverage
from neural_layers.wrappers.lora.targets import Target, adapted, kind_of, outermost
from neural_layers.wrappers.modules import nearest

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"
_PREFIX = "base_model.model."
_ENDS = {
    "lora_A.weight": "lora_A",
    "lora_B.weight": "lora_B",
    "lora_embedding_A": "lora_A",
    "lora_embedding_B": "lora_B",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",  # of early versions of PEFT
}


def adapter_tensors(model: nn.Module, name: str) -> dict[str, Tensor]:
    """The tensors of an adapter under PEFT's keys."""
    found: dict[str, Tensor] = {}
    for path, layer, adapter in _layers(model, name):
        a, b = ("lora_embedding_A", "lora_embedding_B") if isinstance(layer, LoRAEmbedding) else _WEIGHTS
        own = {a: adapter.lora_A, b: adapter.lora_B, "lora_magnitude_vector": adapter.magnitude}
        found.update({f"{_PREFIX}{path}.{key}": t.detach() for key, t in own.items() if t is not None})
    return found


_WEIGHTS = ("lora_A.weight", "lora_B.weight")


def _layers(model: nn.Module, name: str) -> list[tuple[str, LoRALayer, Any]]:
    check_known(model, [name])
    return [(path, layer, layer.adapters[name]) for path, layer in adapted(model).items() if name in layer.adapters]


def save_adapter(model: nn.Module, folder: str | Path, name: str = "default") -> None:
    """Write an adapter to a folder as PEFT does, whole or not at all; what else lies in the folder stays.

    `PeftModel.from_pretrained` loads it, but for adapters of convolutions with several groups, which PEFT has not.
    Raises InputError for a name that the model has not, and for adapters that differ in what the file says once.
    """
    config = write_config(model, {path: adapter.settings for path, _, adapter in _layers(model, name)})
    tensors = {key: t.contiguous().cpu() for key, t in adapter_tensors(model, name).items()}
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with replacing(folder / WEIGHTS) as beside:
        try:
            save_file(tensors, beside, metadata={"format": "pt"})
        except SafetensorError as error:
            raise OSError(f"{folder / WEIGHTS} cannot be written: {error}") from error
        save_json(folder / CONFIG, config)


def read_adapter(folder: str | Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The config and the tensors of an adapter's folder, which PEFT or `save_adapter` wrote.

    Raises InputError for a missing or broken file, pickled weights, and an adapter that is no LoRA.
    """
    folder = Path(folder)
    if not (folder / WEIGHTS).is_file():
        pickled = folder / "adapter_model.bin"
        if pickled.is_file():
            raise InputError(f"{pickled} is pickled, and nothing is unpickled; let PEFT save it as {WEIGHTS}")
        named = sorted(folder.glob(f"*/{WEIGHTS}"))  # PEFT's place for an adapter with a name of its own
        where = (
            f": {named[0].parent} does" if named else "; give a folder that PEFT or save_adapter wrote an adapter to"
        )
        raise InputError(f"{folder} holds no {WEIGHTS}{where}")
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        tensors = load_file(folder / WEIGHTS)
    except (OSError, ValueError, SafetensorError) as error:
        raise InputError(f"the adapter in {folder} cannot be read: {error}") from error
    return check_config(config), tensors


def load_adapter(
    model: nn.Module, folder: str | Path, name: str = "default", *, trainable: bool = False
) -> CoverageReport:
    """Give a model an adapter out of PEFT's files, in place. It is the one in use; the base is frozen.

    trainable: whether the adapter trains on. Its tensors go to the devices of the layers; they keep the file's dtype,
    but are at least float32, and float64 where the layer is.
    Raises InputError, with the model as it was, for files that cannot be read, pickles, an adapter of another base (the
    first key that does not fit, with both shapes), a name that is taken, and merged adapters.
    """
    config, tensors = read_adapter(folder)
    check_new_name(model, name)
    tensors = _without_base(model, tensors)
    targets = {own: Target(names, module, kind) for names, module, kind in _fit(model) for own in names}
    parts = []
    for path, own in _by_module(tensors, folder).items():
        if path not in targets:
            raise InputError(_missing(model, path, next(iter(own)), targets))
        target = targets[path]
        wrapper = wrapper_of(target)
        parts.append((target, wrapper, _adapter(path, wrapper, read_settings(config, path), own)))
    install(model, name, parts, trainable=trainable)
    return coverage(model, name, tuple(covered(*part) for part in parts), {})


def _without_base(model: nn.Module, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors without those of the base, which PEFT writes beside the adapter of an embedding. Raises InputError
    where the model has others."""
    modules = {name: module for names, module in outermost(model) for name in names}
    kept = {}
    for key, tensor in tensors.items():
        path, dot, part = key.removeprefix(_PREFIX).rpartition(".base_layer.")
        if not dot:
            kept[key] = tensor
            continue
        module: Any = modules.get(path)
        base = getattr(module, "base_layer", module)
        own = getattr(base, part, None)
        if not isinstance(own, Tensor) or tuple(own.shape) != tuple(tensor.shape):
            if own is not None and callable(getattr(base, "dense_weight", None)):
                continue  # quantized since, and not to be compared
            shape = None if own is None else tuple(own.shape)
            raise InputError(f"the adapter is of another base: {key} has shape {tuple(tensor.shape)}, here {shape}")
        if own.is_floating_point() and not _same_numbers(own.detach().cpu(), tensor):
            raise InputError(f"the adapter is of another base: {key} has other numbers than the model's {path}")
    return kept


def _same_numbers(own: Tensor, given: Tensor) -> bool:
    """Whether the one is the other, or was rounded to a narrower dtype."""
    return torch.equal(own, given.to(own.dtype)) or torch.equal(own.to(given.dtype), given)


def _fit(model: nn.Module) -> list[tuple[tuple[str, ...], nn.Module, type[LoRALayer]]]:
    return [(names, module, kind) for names, module in outermost(model) if names[0] and (kind := kind_of(module))]


def _missing(model: nn.Module, path: str, key: str, targets: Mapping[str, Target]) -> str:
    alike = nearest(path, targets)
    told = f"; the nearest are {', '.join(alike)}" if alike else ""
    return f"the adapter is of another base: {key} is for {path!r}, which {type(model).__name__} has not{told}"


def _by_module(tensors: Mapping[str, Tensor], folder: str | Path) -> dict[str, dict[str, Tensor]]:
    """The tensors of each module by their keys. Raises InputError for a key that is no adapter's."""
    found: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        path, dot, _ = key.removeprefix(_PREFIX).partition(".lora_")
        if not dot or key[key.index(f"{path}.lora_") + len(path) + 1 :] not in _ENDS:
            raise InputError(f"the adapter in {folder} holds {key}, which is no tensor of a LoRA adapter of one module")
        found.setdefault(path, {})[key] = tensor
    if not found:
        raise InputError(f"the adapter in {folder} is empty")
    return found


def _adapter(path: str, wrapper: LoRALayer, settings: Settings, own: Mapping[str, Tensor]) -> Adapter:
    """An adapter with the tensors of a file. Raises InputError where they do not fit the layer."""
    base = wrapper.base_layer
    given = {_ENDS[key.removeprefix(_PREFIX).removeprefix(f"{path}.")]: key for key in own}
    kept: dict[str, Tensor] = {}
    for part, shape in _shapes(wrapper, settings).items():
        if part not in given:
            raise InputError(f"the adapter has no {part} for {path}; its file is incomplete")
        key = given.pop(part)
        if own[key].shape != shape:
            raise InputError(
                f"the adapter is of another base: {key} has shape {tuple(own[key].shape)}, and {path} "
                f"({type(base).__name__}) with r={settings.r} takes {tuple(shape)}"
            )
        kept[part] = _placed(own[key], base.weight)
    if given:
        raise InputError(f"the adapter holds {next(iter(given.values()))}, and adapter_config.json has use_dora=false")
    return Adapter(settings, kept["lora_A"], kept["lora_B"], kept.get("magnitude"))


def _shapes(wrapper: LoRALayer, settings: Settings) -> dict[str, torch.Size]:
    base = wrapper.base_layer
    a, b = wrapper.begin(base, settings.r, torch.empty(0, device="meta"))
    shapes = {"lora_A": a.shape, "lora_B": b.shape}
    if settings.use_dora:
        inputs, outputs = wrapper.sizes(base)
        matrix = (inputs, outputs) if isinstance(wrapper, LoRAEmbedding) else (outputs, inputs)
        # A quantized matrix is stored in another shape than it has.
        weight = torch.empty(matrix if base.weight.ndim < 3 else base.weight.shape, device="meta")
        shapes["magnitude"] = wrapper.norm(weight).shape
    return shapes


def _placed(tensor: Tensor, stored: Tensor) -> Tensor:
    """On the device of the layer's weight, in at least float32, and float64 where the weight is."""
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    dtype = torch.promote_types(dtype, stored.dtype) if stored.is_floating_point() else dtype
    return tensor.to(stored.device, dtype)
