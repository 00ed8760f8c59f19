"""Which modules of a model get an adapter."""

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from neural_layers.errors import InputError
from neural_layers.wrappers.lora.config import ALL_LINEAR, LoRAConfig
from neural_layers.wrappers.lora.conv import LoRAConv1d
from neural_layers.wrappers.lora.embedding import LoRAEmbedding
from neural_layers.wrappers.lora.layer import LoRALayer
from neural_layers.wrappers.lora.linear import LoRALinear
from neural_layers.wrappers.modules import matches, read_by_others, unmatched_error

_READ_BY_TORCH = "torch reads its weight without calling it"
_TAKEN = "torch.nn.Linear, Embedding and Conv1d do, and the quantized layers of this library"


@dataclass(frozen=True)
class Target:
    """A module that takes an adapter: all its names in the model (the first is the one it is told by), the module,
    which may be a wrapper already, and the wrapper for it."""

    names: tuple[str, ...]
    module: nn.Module
    kind: type[LoRALayer]

    @property
    def name(self) -> str:
        """The first name."""
        return self.names[0]


def kind_of(module: nn.Module) -> type[LoRALayer] | None:
    """The wrapper that fits a module; None where none does."""
    if isinstance(module, LoRALayer):
        return type(module)
    own: Any = module
    if isinstance(getattr(own, "in_features", None), int) and isinstance(getattr(own, "out_features", None), int):
        return LoRALinear
    if isinstance(getattr(own, "num_embeddings", None), int) and isinstance(getattr(own, "embedding_dim", None), int):
        return None if isinstance(module, nn.EmbeddingBag) else LoRAEmbedding
    return LoRAConv1d if isinstance(module, nn.Conv1d) else None


def adapted(model: nn.Module) -> dict[str, LoRALayer]:
    """The wrappers in a model by their (first) names. Raises InputError where there are none."""
    found = {name: module for name, module in model.named_modules() if isinstance(module, LoRALayer)}
    if not found:
        raise InputError(f"the {type(model).__name__} has no adapters; apply_lora(model, config) adds one")
    return found


def outermost(model: nn.Module) -> Iterator[tuple[tuple[str, ...], nn.Module]]:
    """All names and the module of everything in a model but the insides of wrappers, in the order of first names."""
    names: dict[int, list[str]] = {}
    modules: dict[int, nn.Module] = {}
    inside: set[str] = set()
    for name, module in model.named_modules(remove_duplicate=False):
        if name.rpartition(".")[0] in inside and name:
            inside.add(name)
            continue
        if isinstance(module, LoRALayer):
            inside.add(name)
        names.setdefault(id(module), []).append(name)
        modules[id(module)] = module
    for key, own in names.items():
        yield tuple(own), modules[key]


def find_targets(model: nn.Module, config: LoRAConfig) -> tuple[list[Target], dict[str, str]]:
    """The modules that `config` names, and those that it names and that cannot be wrapped, each with its reason.

    Raises InputError for a pattern without a match, with the nearest names.
    """
    modules = [(names, module) for names, module in outermost(model) if names[0]]
    fit = [Target(names, module, kind) for names, module in modules if (kind := kind_of(module)) is not None]
    shut = read_by_others(model)
    if config.target_modules == ALL_LINEAR:
        head = _output_head(model)
        wanted = [t for t in fit if t.kind is LoRALinear and t.module is not head]
    else:
        _refuse_unmatched("target_modules", config.target_modules, modules, fit)
        wanted = [t for t in fit if any(_matches(t.names, pattern) for pattern in config.target_modules)]
    wanted = _in_layers(wanted, config)
    skipped = {t.name: _READ_BY_TORCH for t in wanted if shut.intersection(t.names)}
    targets = [t for t in wanted if t.name not in skipped]
    if not targets:
        why = f" but those whose weights torch reads itself ({', '.join(skipped)})" if skipped else ""
        raise InputError(
            f"target_modules={config.target_modules!r} matches no module inside the {type(model).__name__}{why}; "
            f"{_TAKEN}"
        )
    for field in ("rank_pattern", "alpha_pattern"):
        _refuse_unmatched(field, tuple(getattr(config, field)), [(t.names, t.module) for t in targets], targets)
    return targets, skipped


def _matches(names: tuple[str, ...], pattern: str) -> bool:
    return any(matches(name, pattern) for name in names)


def _refuse_unmatched(
    field: str,
    patterns: str | tuple[str, ...],
    modules: list[tuple[tuple[str, ...], nn.Module]],
    fit: list[Target],
) -> None:
    for pattern in patterns:
        if any(_matches(target.names, pattern) for target in fit):
            continue
        other = next((module for names, module in modules if _matches(names, pattern)), None)
        if other is None:
            raise InputError(f"{field}: {unmatched_error([pattern], [name for t in fit for name in t.names])}")
        raise InputError(f"{field}: {pattern!r} matches a {_told(other)}, which takes no adapter; {_TAKEN}")


def _told(module: nn.Module) -> str:
    # transformers' Conv1D, a linear layer with its weight transposed, is one letter from torch's.
    return f"{type(module).__module__}.{type(module).__qualname__}"


def _output_head(model: nn.Module) -> nn.Module | None:
    getter: Callable[[], Any] | None = getattr(model, "get_output_embeddings", None)
    head = getter() if callable(getter) else None
    return head if isinstance(head, nn.Module) else None


def layer_index(name: str) -> int | None:
    """The first number in a module's name: that of its layer."""
    found = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    return None if found is None else int(found[1])


def _in_layers(targets: list[Target], config: LoRAConfig) -> list[Target]:
    if config.layers is None:
        return targets
    known = sorted({index for t in targets if (index := layer_index(t.name)) is not None})
    missing = [index for index in config.layers if index not in known]
    if missing:
        told = ", ".join(map(str, known)) if known else "none: no name has a number"
        raise InputError(f"layers={missing[0]} has no module of target_modules; those that have: {told}")
    return [t for t in targets if layer_index(t.name) in config.layers]
