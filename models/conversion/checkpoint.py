"""Checkpoints: a config and named tensors, from a folder or from a model in memory."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm
from transformers import CONFIG_MAPPING, GenerationConfig, PreTrainedModel

from neural_layers.errors import InputError
from neural_layers.models.conversion.architectures import architecture_of

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
_SECONDS_UNTIL_PROGRESS = 2.0


@dataclass(frozen=True)
class Checkpoint:
    """config: that of transformers. tensors: under the names they have there. dtype: that of the model.
    generation_config: its defaults, None where there are none. origin: what an error calls it."""

    config: Any
    tensors: dict[str, Tensor]
    dtype: torch.dtype
    generation_config: GenerationConfig | None
    origin: str


def checkpoint_of_model(model: PreTrainedModel) -> Checkpoint:
    """The weights of a model in memory, shared with it. Raises InputError where they lie on the meta device."""
    tensors = dict(model.state_dict())
    origin = type(model).__name__
    if any(tensor.is_meta for tensor in tensors.values()):
        raise InputError(f"{origin} lies on the meta device and has no weights; load them first")
    generation = getattr(model, "generation_config", None)
    return Checkpoint(model.config, tensors, model.dtype, generation, origin)


def read_checkpoint(folder: Path) -> Checkpoint:
    """Read a folder as `save_pretrained` writes it: config.json, safetensors in one file or several, and
    generation_config.json where there is one. Nothing is unpickled. Reading that takes long shows its progress.

    Raises InputError for files that are missing or cannot be read, and for an architecture that is not known.
    """
    config = read_config(folder)
    files = _files_of_tensors(folder)
    sizes = {file: (folder / file).stat().st_size for file in files}
    tensors: dict[str, Tensor] = {}
    bar = tqdm(
        total=sum(sizes.values()),
        unit="B",
        unit_scale=True,
        desc=folder.name,
        delay=_SECONDS_UNTIL_PROGRESS,
        disable=None,
    )
    with bar:
        for file, names in files.items():
            for name, tensor in _tensors(folder / file, names):
                tensors[name] = tensor
                bar.update(tensor.nbytes)
    generation = _generation_config(folder)
    return Checkpoint(config, tensors, _dtype(config, tensors), generation, str(folder))


def read_config(folder: Path) -> Any:
    """The config of transformers in the folder. Raises InputError where it is missing, broken or of an architecture
    that is not known."""
    if not folder.is_dir():
        raise InputError(f"{folder} is no folder; give one that a transformers model was saved to")
    content = _json(folder / "config.json")
    model_type: Any = content.get("model_type")
    architecture_of(model_type)
    # What a config finds wrong with its fields is raised as different errors; each says what is wrong.
    try:
        return CONFIG_MAPPING[model_type].from_pretrained(folder, local_files_only=True)
    except Exception as error:
        raise InputError(f"{folder / 'config.json'}: {first_line(error)}") from error


def first_line(error: Exception) -> str:
    """The error's message without what follows its first line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _files_of_tensors(folder: Path) -> dict[str, list[str] | None]:
    """The files with weights, and the tensors to take from each; None for all."""
    if (folder / SINGLE).is_file():
        return {SINGLE: None}
    if not (folder / INDEX).is_file():
        pickled = sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in folder.glob(pattern))
        if pickled:
            raise InputError(
                f"{folder} holds its weights as {pickled[0]}, which could run any code when it is unpickled; where you "
                "trust it, load it with transformers and save_pretrained(…) writes safetensors"
            )
        raise InputError(f"{folder} holds no {SINGLE} and no {INDEX}")
    content = _json(folder / INDEX)
    places = content.get("weight_map")
    if not isinstance(places, dict) or not places:
        raise InputError(f"{folder / INDEX} has no weight_map")
    files: dict[str, list[str] | None] = {}
    for name, file in places.items():
        if Path(file).name != file or not (folder / file).is_file():
            raise InputError(f"{folder / INDEX} places {name} in {file}, which is not there")
        names = files.setdefault(file, [])
        assert names is not None
        names.append(name)
    return files


def _tensors(path: Path, names: list[str] | None) -> Iterator[tuple[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            held = set(file.keys())
            for name in sorted(held) if names is None else names:
                if name not in held:
                    raise InputError(f"{path} holds no {name}, which {INDEX} places there")
                yield name, file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path} cannot be read: {first_line(error)}") from error


def _dtype(config: Any, tensors: dict[str, Tensor]) -> torch.dtype:
    """What the config says, or the dtype of the largest tensor."""
    given = getattr(config, "dtype", None)
    if isinstance(given, torch.dtype):
        return given
    floats = [tensor for tensor in tensors.values() if tensor.is_floating_point()]
    return max(floats, key=Tensor.numel).dtype if floats else torch.float32


def _generation_config(folder: Path) -> GenerationConfig | None:
    if not (folder / "generation_config.json").is_file():
        return None
    return GenerationConfig.from_dict(_json(folder / "generation_config.json"))


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise InputError(f"{path.parent} holds no {path.name}") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path} cannot be read: {first_line(error)}") from error
    if not isinstance(content, dict):
        raise InputError(f"{path} holds no JSON object")
    return content
