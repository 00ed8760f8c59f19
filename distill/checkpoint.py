"""Checkpoints that appear whole or not at all, and hold no pickles.

A checkpoint is a folder of `model.safetensors` with the model's configs, `optimizer.safetensors`, `state.json` (the
step, the schedule, the place in streamed data, and of every process its random generators and the loss that is not yet
logged) and the trainer's own `trainer_state.json`. transformers would write the optimiser and the random state by
`torch.save`.
"""

import json
import random
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from neural_layers.distill.files import replacing, save_json
from neural_layers.distill.text.errors import first_line
from neural_layers.errors import InputError

WEIGHTS, OPTIMIZER, STATE = "model.safetensors", "optimizer.safetensors", "state.json"
TRAINER_STATE = "trainer_state.json"


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint on disk: its folder, its step and the content of its `state.json`."""

    folder: Path
    step: int
    state: dict[str, Any]


@contextmanager
def disk_errors() -> Iterator[None]:
    """Raise OSError where safetensors cannot write a file, as everything else does."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(f"weights cannot be written: {first_line(error)}") from error


def save_model(folder: Path, model: Any, weights: dict[str, Tensor] | None = None) -> None:
    """Write a model's weights and configs to `folder`, as a model that generates with its cache.

    weights: the whole state dict where the model itself holds but a part of each tensor
    """
    # Trainer turns the cache off in the config, which would make generation from the saved model slow.
    model.config.use_cache, before = True, model.config.use_cache
    try:
        with disk_errors():
            model.save_pretrained(folder, state_dict=weights, max_shard_size="1000GB")
    finally:
        model.config.use_cache = before


def write_checkpoint(
    folder: Path,
    model: Any,
    weights: dict[str, Tensor] | None,
    optimizer: dict[str, Any],
    state: dict[str, Any],
    trainer_state: dict[str, Any],
    others: Mapping[str, dict[str, Tensor]] = MappingProxyType({}),
) -> None:
    """Write a checkpoint to `folder`; while it is written, and after a kill, the folder does not exist.

    weights: as in `save_model`. optimizer: its state dict, with whole tensors. others: tensors of further files.
    """
    for values in optimizer["state"].values():
        for name, value in values.items():
            if not isinstance(value, Tensor):
                raise ValueError(
                    f"the optimiser keeps {name}={value!r}, and a checkpoint holds tensors alone; use adamw_torch_fused"
                )
    tensors = {
        f"{key}/{name}": value.contiguous()
        for key, values in optimizer["state"].items()
        for name, value in values.items()
    }
    with replacing(folder) as beside:
        save_model(beside, model, weights)
        with disk_errors():
            save_file(tensors, beside / OPTIMIZER)
            for name, content in others.items():
                save_file(content, beside / name)
        save_json(beside / TRAINER_STATE, trainer_state)
        save_json(beside / STATE, {**state, "param_groups": optimizer["param_groups"]})
        if folder.is_dir():
            _remove(folder)  # of a training that was continued from an earlier step


def read_optimizer(checkpoint: Checkpoint) -> dict[str, Any]:
    """The optimiser's state dict of a checkpoint; the keys are numbers, or names where they were."""
    found: dict[Any, dict[str, Tensor]] = {}
    for name, value in load_file(checkpoint.folder / OPTIMIZER).items():
        key, _, field = name.rpartition("/")
        found.setdefault(int(key) if key.isdigit() else key, {})[field] = value
    return {"state": found, "param_groups": checkpoint.state["param_groups"]}


def load_weights(model: nn.Module, folder: Path) -> None:
    """Load a checkpoint's or a saved model's weights into `model`, whose every parameter they must hold.

    Raises: InputError where a tensor is missing, unknown or of another shape, or the file is broken.
    """
    try:
        weights = load_file(folder / WEIGHTS)
        missing, unexpected = model.load_state_dict(weights, strict=False)
    except (SafetensorError, RuntimeError, OSError) as error:
        raise InputError(f"the weights in {folder} cannot be loaded: {first_line(error)}") from error
    own = dict(model.named_parameters(remove_duplicate=False))
    loaded = {id(own[name]) for name in weights if name in own}
    missing = [name for name in missing if name not in own or id(own[name]) not in loaded]  # tied to a loaded one
    if missing or unexpected:
        raise InputError(f"the weights in {folder} are of another model ({(missing + unexpected)[0]} does not fit)")


def newest_checkpoint(folder: Path) -> Checkpoint | None:
    """The checkpoint of the highest step in `folder` that is complete; None where there is none."""
    numbered = sorted(((int(m[1]), p) for p in folder.glob("checkpoint-*") if (m := _name(p))), reverse=True)
    return next((found for _, path in numbered if (found := open_checkpoint(path)) is not None), None)


def _name(path: Path) -> re.Match[str] | None:
    return re.fullmatch(r"checkpoint-(\d+)", path.name)


def open_checkpoint(folder: Path) -> Checkpoint | None:
    """The checkpoint in `folder`, or None where a file of it is missing or truncated."""
    try:
        state = json.loads((folder / STATE).read_text())
        json.loads((folder / TRAINER_STATE).read_text())
        for name in (WEIGHTS, OPTIMIZER):
            with safe_open(folder / name, framework="pt"):
                pass
        return Checkpoint(folder, state["step"], state)
    except (OSError, ValueError, KeyError, TypeError, SafetensorError):
        return None


def remove_old(folder: Path, keep: int, best: int | None) -> None:
    """Remove all checkpoints but the `keep` newest and that of step `best`."""
    steps = sorted(int(m[1]) for p in folder.glob("checkpoint-*") if (m := _name(p)))
    for step in steps[:-keep]:
        if step != best:
            _remove(folder / f"checkpoint-{step}")


def remove_newer(folder: Path, step: int) -> None:
    """Remove the checkpoints behind `step`, which is the last that is complete."""
    for path in folder.glob("checkpoint-*"):
        if (m := _name(path)) and int(m[1]) > step:
            _remove(path)


def _remove(checkpoint: Path) -> None:
    # Renamed first: a kill while it is removed leaves no half of a checkpoint under its name.
    away = checkpoint.with_name(f".{checkpoint.name}.old")
    if away.is_dir():
        shutil.rmtree(away)  # left by such a kill
    checkpoint.rename(away)
    shutil.rmtree(away)


def remove_leftovers(folder: Path) -> None:
    """Remove what a killed process left of a checkpoint or a model that it was writing or removing."""
    for path in (*folder.glob(".*.part"), *folder.glob(".*.old")):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()


def random_state() -> dict[str, Any]:
    """The state of the process's random generators (Python, NumPy, torch) as JSON can hold it."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)
    state = {
        "python": random.getstate(),
        "numpy": [name, np.asarray(keys).tolist(), position, has_gauss, gauss],
        "torch": _hex(torch.get_rng_state()),
    }
    if torch.cuda.is_available():
        state["cuda"] = [_hex(value) for value in torch.cuda.get_rng_state_all()]
    return state


def restore_random_state(state: dict[str, Any]) -> None:
    """Set the random generators to what `random_state` returned."""
    version, numbers, gauss = state["python"]
    random.setstate((version, tuple(numbers), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(_tensor(state["torch"]))
    if torch.cuda.is_available() and "cuda" in state:
        torch.cuda.set_rng_state_all([_tensor(value) for value in state["cuda"]])


def _hex(value: Tensor) -> str:
    return bytes(value.cpu().numpy().tobytes()).hex()


def _tensor(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)
