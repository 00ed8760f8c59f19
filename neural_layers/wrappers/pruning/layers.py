"""Which layers of a model can be pruned, and which of them are meant."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from torch.nn.utils import parametrize

from neural_layers.wrappers.modules import matches, tied, unmatched_error

KINDS: dict[str, tuple[type[nn.Module], ...]] = {
    "linear": (nn.Linear,),
    "conv": (nn.Conv1d, nn.Conv2d, nn.Conv3d),
    "embedding": (nn.Embedding,),
}


def prunable(model: nn.Module, kinds: Iterable[str]) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """Layers of these kinds by name, and those left alone with the reason.

    A weight that several layers share belongs to the first of them; that of an embedding to the embedding, which is
    why a head tied to it is left alone unless "embedding" is one of the kinds.
    Raises ValueError for an unknown kind.
    """
    classes = _classes(kinds)
    shared = {module: names for names in tied(model).values() for module in names}
    embeddings = {name for name, module in model.named_modules() if isinstance(module, nn.Embedding)}
    layers: dict[str, nn.Module] = {}
    skipped: dict[str, str] = {}
    seen: dict[int, str] = {}
    for name, module in model.named_modules():
        reason = _obstacle(name, module)
        if reason is not None:
            skipped[name] = reason
            continue
        if not isinstance(module, classes):
            continue
        embedding = next((other for other in shared.get(name, ()) if other in embeddings), None)
        first = seen.setdefault(id(module.weight), name)
        if embedding is not None and not isinstance(module, nn.Embedding) and "embedding" not in kinds:
            skipped[name] = (
                f"its weight is that of the embedding {embedding}; kinds=('linear', 'embedding') prunes both"
            )
        elif first != name:
            skipped[name] = f"shares its weight with {first}"
        else:
            layers[name] = module
    return layers, skipped


def chosen(
    model: nn.Module, kinds: Iterable[str], include: Iterable[str] | None, exclude: Iterable[str]
) -> tuple[dict[str, nn.Module], dict[str, str]]:
    """The prunable layers that a pattern of `include` matches (None: all) and none of `exclude`; as `prunable`.

    Raises ValueError where a pattern matches no layer (the nearest names are told), where one names a layer that cannot
    be pruned, and where nothing is left to prune.
    """
    layers, skipped = prunable(model, kinds)
    wanted, unwanted = pattern_list("include", include), pattern_list("exclude", exclude)
    known = [*layers, *skipped]
    unmatched = [p for p in [*wanted, *unwanted] if not any(matches(name, p) for name in known)]
    if unmatched:
        raise ValueError(f"{unmatched_error(unmatched, known)}; of kinds={tuple(kinds)}")

    def is_meant(name: str) -> bool:
        is_in = include is None or any(matches(name, p) for p in wanted)
        return is_in and not any(matches(name, p) for p in unwanted)

    for name, reason in skipped.items():
        if include is not None and is_meant(name):
            raise ValueError(f"{name} cannot be pruned: {reason}")
    found = {name: module for name, module in layers.items() if is_meant(name)}
    if not found:
        told = "; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:3])
        raise ValueError(f"there is no layer of kinds={tuple(kinds)} to prune" + (f" ({told})" if told else ""))
    return found, skipped


def _classes(kinds: Iterable[str]) -> tuple[type[nn.Module], ...]:
    kinds = list(kinds)
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown or not kinds or isinstance(kinds, str):
        raise ValueError(f"kinds={kinds} must be some of {', '.join(KINDS)}")
    return tuple(cls for kind in kinds for cls in KINDS[kind])


def pattern_list(name: str, patterns: Iterable[str] | None) -> list[str]:
    """The patterns of the argument `name`. Raises ValueError for a single string."""
    if isinstance(patterns, str):
        raise ValueError(f"{name}={patterns!r} must be a sequence of patterns: [{patterns!r}]")
    return list(patterns or ())


def _obstacle(name: str, module: Any) -> str | None:
    """Why a layer with a matrix cannot be pruned; None where it can, or where it is no such layer."""
    if any(part.startswith("lora_") for part in name.split(".")):
        return "it is part of an adapter; only what it adapts is pruned" if isinstance(module, nn.Linear) else None
    if not hasattr(module, "in_features") and not isinstance(module, sum(KINDS.values(), ())):
        return None
    if hasattr(module, "base_layer"):
        return None  # an adapter around a layer, which is looked at by itself
    kind = type(module).__name__
    weight = module._parameters.get("weight")
    if hasattr(module, "dense_weight") or "weight" in module._buffers:
        return f"{kind} holds quantized weights; prune before quantize, which keeps the zeros"
    if parametrize.is_parametrized(module) or (weight is None and hasattr(module, "weight")):
        return f"the weight of this {kind} is computed from others (a parametrization); make it plain first"
    if weight is None:
        return f"{kind} has no parameter named weight"
    if type(weight.data) is not torch.Tensor:
        return f"its weight is a {type(weight.data).__name__}; prune before the weights are quantized or split"
    if not weight.is_floating_point():
        return (
            f"its weights are {str(weight.dtype).removeprefix('torch.')}; prune before quantize, which keeps the zeros"
        )
    if weight.is_meta:
        return "its weights are on the meta device; load them first"
    return None
