"""Which layers of a model a scheme is for, and why the others are left as they are."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from neural_layers.linear import Linear
from neural_layers.wrappers.modules import matches, nearest, read_by_others, tied, unmatched_error
from neural_layers.wrappers.quantization.formats import format_of

_TAKEN = "only linear layers (nn.Linear) and embeddings (nn.Embedding) can be quantized"
_READ = "torch's attention reads its weight without calling it"
_WHOLE = "transformers keeps it in float32, and casts its input to the dtype that its weight is stored in"
# Schemes whose stored dtype holds no activations: bytes of codes, and float16, for which it is kept in float32.
_CAST = ("float16", "int4", "nf4", "fp4")
_FORWARDS = (nn.Linear.forward, Linear.forward, nn.Embedding.forward)


@dataclass(frozen=True)
class Selection:
    """layers: what is to be quantized, by first name. skipped: the reason of each other layer with a weight matrix.
    owners: of a layer that holds the weight of an earlier one, that one's name."""

    layers: dict[str, nn.Module]
    skipped: dict[str, str]
    owners: dict[str, str]


def as_patterns(patterns: str | Iterable[str] | None) -> tuple[str, ...] | None:
    """A tuple of patterns out of one, several, or None for no restriction."""
    return (patterns,) if isinstance(patterns, str) else None if patterns is None else tuple(patterns)


def select(
    model: nn.Module, scheme: object, include: tuple[str, ...] | None, exclude: tuple[str, ...], *, embeddings: bool
) -> Selection:
    """The layers that are to be quantized to `scheme`, by patterns as `wrappers.modules.matches` reads them.

    Raises ValueError for a pattern that fits no module, an `include` that asks for layers of another kind, layers that
    are quantized already, and where none is left.
    """
    names = _names(model)
    _check_patterns((include or ()) + exclude, [name for own in names.values() for name in own])
    layers: dict[str, nn.Module] = {}
    skipped: dict[str, str] = {}
    read, whole = read_by_others(model), kept_in_float32(model) if scheme in _CAST else set()
    for name, module in model.named_modules():
        own, format = names[id(module)], format_of(module)
        asked = include is None or any(matches(n, p) for n in own for p in include)
        left_out = [p for p in exclude if any(matches(n, p) for n in own)]
        if format is not None:
            if asked and not left_out:
                _refuse_quantized(name, format.scheme)
            continue
        why = obstacle(module)
        if why is None and not name:
            raise ValueError(
                f"the model is itself a {type(module).__name__}, which has no place to be replaced in; quantize a "
                "module that holds it"
            )
        if not _holds_matrix(module):
            continue
        if left_out:
            skipped[name] = f"excluded by {left_out[0]!r}"
        elif not asked:
            skipped[name] = "not included"
        elif why is not None:
            skipped[name] = why
        elif any(n in read for n in own):
            skipped[name] = _READ
        elif any(n in whole for n in own):
            skipped[name] = _WHOLE
        elif isinstance(module, nn.Embedding) and not embeddings:
            skipped[name] = "embeddings=False"
        else:
            layers[name] = module
    for pattern in include or ():
        _check_included(pattern, model, layers, names, skipped)
    owners = _tie(model, layers, skipped)
    if not layers:
        told = "; ".join(f"{name}: {why}" for name, why in list(skipped.items())[:3])
        raise ValueError(f"no layer is left to quantize ({told or 'the model has none'}); {_TAKEN}")
    return Selection(layers, skipped, owners)


def select_named(model: nn.Module, entries: Mapping[str, Mapping[str, Any]]) -> Selection:
    """The layers that a plan names. Raises ValueError for one that there is not, or that cannot be quantized."""
    modules = dict(model.named_modules(remove_duplicate=False))
    layers: dict[str, nn.Module] = {}
    read, whole, first = read_by_others(model), kept_in_float32(model), dict[int, str]()
    for name, entry in entries.items():
        if name not in modules:
            raise ValueError(f"the plan's layer {unmatched_error([name], modules)}; the plan is of another model")
        module = modules[name]
        format = format_of(module)
        if format is not None:
            _refuse_quantized(name, format.scheme)
        why = obstacle(module) or (_READ if name in read else None)
        if why is None and name in whole and entry["scheme"] in _CAST:
            why = _WHOLE
        if why is not None:
            raise ValueError(f"the plan's layer {name!r} cannot be quantized: {why}")
        if first.setdefault(id(module), name) != name:
            raise ValueError(f"the plan's layers {first[id(module)]!r} and {name!r} are one module; name it once")
        layers[name] = module
    skipped = {
        name: "not in the plan"
        for name, module in model.named_modules()
        if name not in layers and _holds_matrix(module) and format_of(module) is None
    }
    taken = dict(layers)
    owners = _tie(model, layers, skipped)
    for name in taken.keys() - layers.keys():
        raise ValueError(f"the plan's layer {name!r} cannot be quantized alone: {skipped[name]}")
    return Selection(layers, skipped, owners)


def obstacle(module: nn.Module) -> str | None:
    """Why a module can be no quantized layer; None where it can."""
    kind = type(module).__name__
    if not isinstance(module, (nn.Linear, nn.Embedding)):
        return f"it is a {kind}; {_TAKEN}"
    if type(module).forward not in _FORWARDS:
        return f"a {kind} has a forward of its own, which a quantized layer would not follow"
    if torch.nn.utils.parametrize.is_parametrized(module):
        return "its weight is parametrized; remove the parametrization first"
    for name in ("weight", "bias") if isinstance(module, nn.Linear) else ("weight",):
        if name not in module._parameters:
            return (
                f"its {name} is no parameter but computed before every call, as by weight_norm or "
                "torch.nn.utils.prune; remove that first"
            )
    if isinstance(module, nn.Embedding) and module.max_norm is not None:
        return f"max_norm={module.max_norm} changes its table in every call"
    if not module.weight.is_floating_point():
        return f"its weight is {module.weight.dtype}, no floating-point numbers"
    return None


def kept_in_float32(model: nn.Module) -> set[str]:
    """The names of the modules that transformers keeps in float32, as T5's `wo`, which reads its weight's dtype."""
    return {
        f"{start}.{name}".removeprefix(".")
        for start, inner in model.named_modules()
        for pattern in getattr(inner, "_keep_in_fp32_modules", None) or ()
        for name, module in inner.named_modules(remove_duplicate=False)
        if isinstance(module, nn.Linear) and matches(name, pattern)
    }


def _names(model: nn.Module) -> dict[int, list[str]]:
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    return names


def _holds_matrix(module: nn.Module) -> bool:
    if isinstance(module, nn.utils.parametrize.ParametrizationList):
        return False  # it is told of at the layer that it belongs to
    return isinstance(module, (nn.Linear, nn.Embedding)) or any(
        p is not None and p.dim() > 1 for p in module._parameters.values()
    )


def _refuse_quantized(name: str, scheme: str) -> None:
    where = f"{name!r} is" if name else "the model is"
    if scheme == "int8_qat":
        raise ValueError(f"{where} prepared for int8_qat already; finish with convert_qat(model) or exclude it")
    raise ValueError(f"{where} quantized already ({scheme}); quantize a float model, or exclude it")


def _check_patterns(patterns: tuple[str, ...], names: list[str]) -> None:
    for pattern in patterns:
        if not any(matches(name, pattern) for name in names if name):
            alike = nearest(pattern, names)
            hint = f"; the nearest are {', '.join(alike)}" if alike else ""
            raise ValueError(f"the pattern {pattern!r} matches no module{hint}")


def _check_included(
    pattern: str,
    model: nn.Module,
    layers: dict[str, nn.Module],
    names: dict[int, list[str]],
    skipped: dict[str, str],
) -> None:
    """Raise ValueError for a pattern of `include` that asks for no layer that can be quantized."""
    fitting = [name for name, module in model.named_modules() if any(matches(n, pattern) for n in names[id(module)])]
    if any(name in layers for name in fitting):
        return
    name = next((name for name in fitting if name in skipped), fitting[0])
    why = skipped.get(name, f"it is a {type(model.get_submodule(name)).__name__}; {_TAKEN}")
    raise ValueError(f"the pattern {pattern!r} asks for {name!r}, which cannot be quantized: {why}")


def _tie(model: nn.Module, layers: dict[str, nn.Module], skipped: dict[str, str]) -> dict[str, str]:
    """Who shares whose weight. A layer whose weight another module holds that stays as it is, stays too."""
    first = {id(module): name for name, module in model.named_modules()}
    modules = dict(model.named_modules(remove_duplicate=False))
    owners: dict[str, str] = {}
    for holders in tied(model).values():
        names = list(dict.fromkeys(first[id(modules[name])] for name in holders))
        staying = [name for name in names if name not in layers]
        for name in names:
            if staying and name in layers:
                skipped[name] = f"it shares a parameter with {staying[0]}: {skipped.get(staying[0], 'left as it is')}"
                del layers[name]
        if staying or len(names) == 1:
            continue
        if len({id(layers[name].weight) for name in names}) > 1:
            continue  # a bias is what they share, of which each layer keeps a copy
        # A table gives lookups of its rows, so it comes first; what multiplies by it follows.
        owner = next((name for name in names if isinstance(layers[name], nn.Embedding)), names[0])
        owners |= {name: owner for name in names if name != owner}
    return owners
