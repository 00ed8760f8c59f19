"""Adapters put into a model, and taken out of it."""

from collections.abc import Iterable
from typing import Any

from torch import nn

from neural_layers.errors import InputError
from neural_layers.wrappers.lora.adapter import Adapter, Selection, Settings
from neural_layers.wrappers.lora.config import LoRAConfig
from neural_layers.wrappers.lora.layer import LoRALayer
from neural_layers.wrappers.lora.report import CoverageReport, CoveredLayer, coverage
from neural_layers.wrappers.lora.targets import Target, adapted, find_targets, outermost
from neural_layers.wrappers.modules import nearest, replace_module


def apply_lora(model: nn.Module, config: LoRAConfig, name: str = "default") -> CoverageReport:
    """Give the modules that `config` names an adapter, in place, and freeze everything else.

    The new adapter changes nothing until it is trained. It is the one in use and the one that trains; adapters of
    earlier calls stay, and `set_adapter` takes them up again. The base's weights are shared, never copied: a tied
    weight stays tied, and an adapter of one of its two modules changes that module alone. A model whose gradient
    checkpointing is on gets `enable_input_require_grads`, because the reentrant kind would else find nothing to train.

    The state dict has the names of the wrappers: it continues a training, and `from_pretrained` does not find its
    weights in it. Save the adapter (`save_adapter`), or the whole model after `fold_lora`.

    Raises InputError, with the model as it was, for targets that match nothing (naming the nearest), a rank above a
    layer's, a name that is taken, merged adapters, and within `adapter_rows` and `disable_adapters`.
    """
    check_new_name(model, name)
    targets, skipped = find_targets(model, config)
    settings = {target.name: _settings(config, target) for target in targets}
    wrappers = [wrapper_of(target) for target in targets]
    made = []
    for target, wrapper in zip(targets, wrappers, strict=True):
        try:
            made.append(wrapper.new_adapter(settings[target.name]))
        except InputError as error:
            raise InputError(f"{target.name}: {error}") from error
    install(model, name, list(zip(targets, wrappers, made, strict=True)), trainable=True)
    return coverage(model, name, tuple(map(covered, targets, wrappers, made)), skipped)


def _settings(config: LoRAConfig, target: Target) -> Settings:
    return Settings(
        r=config.rank_of(target.name),
        alpha=config.alpha_of(target.name),
        dropout=config.dropout,
        use_rslora=config.use_rslora,
        use_dora=config.use_dora,
    )


def check_new_name(model: nn.Module, name: str) -> None:
    """Raise InputError for a name that no adapter can have or that one has, and while adapters are merged, disabled or
    chosen by rows."""
    if not name or "." in name or hasattr(nn.ModuleDict(), name):
        raise InputError(f"an adapter cannot be named {name!r}: a name has no dots and is none of torch's own words")
    for own, layer in ((n, m) for n, m in model.named_modules() if isinstance(m, LoRALayer)):
        if layer.merged is not None:
            raise InputError(f"adapters are merged into {own}; unmerge_lora(model) before another is added")
        if layer.selection.rows is not None or layer.selection.is_disabled:
            raise InputError("adapters are chosen by rows or disabled; leave that block before another is added")
        if name in layer.adapters:
            raise InputError(f"there is an adapter {name!r} already; remove_adapter(model, {name!r}), or choose a name")


def wrapper_of(target: Target) -> LoRALayer:
    """The wrapper in the target's place, or a new one around it, which is not in the model yet."""
    return target.module if isinstance(target.module, LoRALayer) else target.kind(target.module)


def install(model: nn.Module, name: str, parts: list[tuple[Target, LoRALayer, Adapter]], *, trainable: bool) -> None:
    """Put wrappers with a new adapter into the model, freeze the rest, and take the adapter into use."""
    for target, wrapper, adapter in parts:
        wrapper.adapters[name] = adapter.train(wrapper.training)
        for place in target.names if target.module is not wrapper else ():
            replace_module(model, place, wrapper)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    for layer in adapted(model).values():
        layer.selection = Selection(((name, 1.0),))
    for _, _, adapter in parts:
        adapter.requires_grad_(trainable)
    own: Any = model
    if getattr(own, "is_activation_checkpointing", False) and hasattr(own, "enable_input_require_grads"):
        own.enable_input_require_grads()


def covered(target: Target, wrapper: LoRALayer, adapter: Adapter) -> CoveredLayer:
    """A line of the report."""
    size = sum(p.numel() for p in adapter.parameters())
    sizes = wrapper.sizes(wrapper.base_layer)
    return CoveredLayer(target.name, type(wrapper.base_layer).__name__, *sizes, adapter.settings.r, size)


def adapter_names(model: nn.Module) -> tuple[str, ...]:
    """The names of a model's adapters, the oldest first. Raises InputError where there are none."""
    found: dict[str, None] = {}
    for layer in adapted(model).values():
        found.update(dict.fromkeys(layer.adapters))
    return tuple(found)


def check_known(model: nn.Module, names: Iterable[str]) -> None:
    """Raise InputError for an adapter that the model has not."""
    known = adapter_names(model)
    for name in names:
        if name not in known:
            alike = nearest(name, known) or known
            raise InputError(f"there is no adapter {name!r}; there are {', '.join(map(repr, alike))}")


def remove_adapter(model: nn.Module, name: str) -> None:
    """Take an adapter out of a model; a layer without any is the plain layer again, frozen as apply_lora left it.

    Raises InputError for a name that the model has not, while adapters are merged, and within `adapter_rows`.
    """
    check_known(model, [name])
    for own, layer in adapted(model).items():
        if layer.merged is not None:
            raise InputError(f"adapters are merged into {own}; unmerge_lora(model) before one is removed")
        if layer.selection.rows is not None:
            raise InputError("adapters are in use by rows; leave the block of adapter_rows before one is removed")
    for layer in adapted(model).values():
        if name in layer.adapters:
            del layer.adapters[name]
        kept = tuple((other, weight) for other, weight in layer.selection.weights if other != name)
        layer.selection = Selection(kept, None, layer.selection.is_disabled)
    unwrap(model, [layer for layer in adapted(model).values() if not layer.adapters])


def unwrap(model: nn.Module, layers: list[LoRALayer]) -> None:
    """Put the base layers back in the places of these wrappers."""
    gone = {id(layer) for layer in layers}
    for places, module in list(outermost(model)):
        if isinstance(module, LoRALayer) and id(module) in gone:
            for place in places:
                replace_module(model, place, module.base_layer.train(module.training))
