"""A model with linear layers of 4 bits, kept as a folder: config.json, model.safetensors, packed.json."""

import copy
import json
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import nn

from neural_layers.distill.files import save_json
from neural_layers.errors import InputError
from neural_layers.linear_4bit import Linear4bit

QUANT_TYPE, BLOCK_SIZE = "nf4", 64


def packed_copy(model: nn.Module) -> nn.Module:
    """A copy of a transformers model with each `nn.Linear` in NF4, but for those of `unpacked`.

    Raises InputError where no layer is left to pack.
    """
    made = copy.deepcopy(model).eval()
    names = packable(made)
    if not names:
        raise InputError(f"{type(model).__name__} has no linear layers besides its head; leave nf4 out")
    _replace(made, names)
    return made


def packable(model: Any) -> list[str]:
    """The names of the linear layers that can be packed.

    Left as they are: the output layer, a linear layer that shares its weight with another module (a tied head), the
    head of a classifier (all that is outside `base_model`), and the projections that torch's own attention reads the
    weights of.
    """
    uses: dict[int, int] = {}
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    head, base = model.get_output_embeddings(), model.base_model
    inside = {id(module) for module in base.modules()}
    readers = (nn.MultiheadAttention, nn.TransformerEncoderLayer)
    read = {id(child) for module in model.modules() if isinstance(module, readers) for child in module.modules()}
    return [
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
        and module is not head
        and id(module) in inside
        and id(module) not in read
        and uses[id(module.weight)] == 1
    ]


def save_packed(model: Any, folder: Path) -> None:
    """Write a model that `packed_copy` made. A weight that several modules share is written once."""
    names = [name for name, module in model.named_modules() if isinstance(module, Linear4bit)]
    tensors: dict[str, Any] = {}
    seen: set[tuple[int, int]] = set()
    for name, tensor in model.state_dict().items():
        place = tensor.data_ptr(), tensor.numel()
        if tensor.numel() == 0 or place not in seen:
            tensors[name] = tensor.contiguous()
        seen.add(place)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    model.config.to_json_file(str(folder / "config.json"), use_diff=False)
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.to_json_file(str(folder / "generation_config.json"))
    content = {"architecture": type(model).__name__, "quant_type": QUANT_TYPE, "block_size": BLOCK_SIZE}
    save_json(folder / "packed.json", {**content, "linear_layers": names})


def load_packed(folder: Path, model_class: Any) -> Any:
    """The model in a folder that `save_packed` wrote, in evaluation mode.

    model_class: the class that it was packed as, whose name stands in packed.json.
    Raises InputError for a folder without the three files and for another class; RuntimeError for weights that do not
    fit.
    """
    for name in ("packed.json", "config.json", "model.safetensors"):
        if not (folder / name).is_file():
            raise InputError(f"there is no {name} in {folder}; give the folder of a packed model")
    content = json.loads((folder / "packed.json").read_text(encoding="utf-8"))
    if content["architecture"] != model_class.__name__:
        raise InputError(f"{folder} holds a {content['architecture']}, not a {model_class.__name__}")
    model = model_class(model_class.config_class.from_pretrained(folder, local_files_only=True)).eval()
    _replace(model, content["linear_layers"])
    model.tie_weights()
    missing, unexpected = model.load_state_dict(load_file(folder / "model.safetensors"), strict=False)
    tied = set(getattr(model, "all_tied_weights_keys", None) or ())
    wrong = [name for name in missing if name not in tied] + list(unexpected)
    if wrong:
        raise RuntimeError(f"the weights in {folder} do not fit its config.json: {wrong[0]} is missing or unknown")
    return model


def _replace(model: nn.Module, names: list[str]) -> None:
    for name in names:
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        parent, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent), child, Linear4bit.from_linear(layer, QUANT_TYPE, BLOCK_SIZE))
