"""Which of a model's adapters are in use."""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from torch import nn

from neural_layers.errors import InputError
from neural_layers.wrappers.lora.adapter import Selection
from neural_layers.wrappers.lora.apply import check_known
from neural_layers.wrappers.lora.layer import LoRALayer
from neural_layers.wrappers.lora.targets import adapted

Names = str | Sequence[str] | Mapping[str, float]


def weights_of(model: nn.Module, names: Names) -> tuple[tuple[str, float], ...]:
    """The adapters that are named, each with its weight. Raises InputError for unknown ones and weights that are no
    numbers."""
    named = {names: 1.0} if isinstance(names, str) else dict(names) if isinstance(names, Mapping) else None
    found = dict.fromkeys(names, 1.0) if named is None else {n: float(w) for n, w in named.items()}
    check_known(model, found)
    for name, weight in found.items():
        if not math.isfinite(weight):
            raise InputError(f"the weight of adapter {name!r} is {weight}; give a finite number")
    return tuple(found.items())


def set_adapter(model: nn.Module, names: Names, *, trainable: bool = True) -> None:
    """Take other adapters into use: one, several that are added up, or {name: weight}.

    W + Σ weight · ΔW. Those in use train, the others are frozen; with trainable=False all are.
    Raises InputError for names that the model has not, and while adapters are merged.
    """
    weights = weights_of(model, names)
    layers = _free(model, "another adapter is taken into use")
    chosen = dict(weights)
    for layer in layers:
        layer.selection = Selection(weights, layer.selection.rows, layer.selection.is_disabled)
        for name, adapter in layer.adapters.items():
            adapter.requires_grad_(trainable and name in chosen)


@contextmanager
def disable_adapters(model: nn.Module) -> Iterator[None]:
    """Within, the model is its base alone. Raises InputError while adapters are merged."""
    with _selected(_free(model, "adapters are disabled"), is_disabled=True):
        yield


@contextmanager
def adapter_rows(model: nn.Module, names: Sequence[str | None]) -> Iterator[None]:
    """Within, row i of every batch is changed by the adapter names[i], or by none where that is None.

    The inputs of all wrapped layers have the rows as their first dimension, and as many as there are names; a layer
    without the adapter passes its rows unchanged. `backward()` of what is computed within belongs within too where
    gradient checkpointing computes it again. Raises InputError for names that the model has not, no names, another
    batch, and while adapters are merged.
    """
    if not names:
        raise InputError("adapter_rows got no names; give one for each row of the batch, None for the base alone")
    check_known(model, [name for name in names if name is not None])
    with _selected(_free(model, "adapters are chosen by rows"), rows=tuple(names)):
        yield


def _free(model: nn.Module, what: str) -> list[LoRALayer]:
    layers = adapted(model)
    for name, layer in layers.items():
        if layer.merged is not None:
            raise InputError(f"adapters are merged into {name}; unmerge_lora(model) before {what}")
    return list(layers.values())


@contextmanager
def _selected(
    layers: list[LoRALayer], *, rows: tuple[str | None, ...] | None = None, is_disabled: bool = False
) -> Iterator[None]:
    before = [layer.selection for layer in layers]
    for layer in layers:
        layer.selection = Selection(layer.selection.weights, rows, is_disabled)
    try:
        yield
    finally:
        for layer, old in zip(layers, before, strict=True):
            layer.selection = Selection(layer.selection.weights, old.rows, old.is_disabled)
