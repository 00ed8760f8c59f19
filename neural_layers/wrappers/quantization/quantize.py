"""Quantize the layers of any model, in place, all or none."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from neural_layers.linear_int8 import LinearInt8
from neural_layers.wrappers.modules import replace_module, tensor_bytes
from neural_layers.wrappers.quantization.calibration import OBSERVERS, input_ranges
from neural_layers.wrappers.quantization.carrying import hold_zeros, take_hooks
from neural_layers.wrappers.quantization.formats import Format, format_of, share
from neural_layers.wrappers.quantization.plan import Plan
from neural_layers.wrappers.quantization.qat import FakeQuantizedEmbedding, FakeQuantizedLinear
from neural_layers.wrappers.quantization.report import LayerReport, QuantizationReport
from neural_layers.wrappers.quantization.selection import Selection, as_patterns, select, select_named

METHOD = "neural_layers"


def quantize(
    model: nn.Module,
    scheme: str | Plan,
    *,
    double_quant: bool = False,
    block_size: int | None = None,
    calibration: Iterable[Any] | None = None,
    observer: str | None = None,
    include: str | Iterable[str] | None = None,
    exclude: str | Iterable[str] = (),
    embeddings: bool = True,
) -> QuantizationReport:
    """Quantize the linear layers and the embeddings of `model`, in place.

    scheme:       float16, bfloat16: the weight in 16 bits, the product too; the rest of the model keeps its dtype
                  int8_dynamic: weight in 8 bits with a scale for each output, each row of the input with its own
                  int8_static: the same weight, the input with a range that was measured on `calibration`
                  int8_qat: prepared to be trained further as int8_dynamic; `convert_qat` makes it that
                  int4: 4 bits, affine, in groups of `block_size` along the inputs
                  nf4, fp4: 4 bits of bitsandbytes (arXiv 2305.14314), `double_quant` for the scales too
                  a Plan: each layer as it says; it replaces all arguments but `calibration` and `observer`
    block_size:   of int4, nf4 and fp4, by default 64
    calibration:  for int8_static, batches: a dict is `model(**batch)`, a tuple or list `model(*batch)`, a tensor
                  `model(batch)`; run in evaluation mode without gradients
    observer:     for int8_static, how the range is chosen: "minmax" (default), "percentile" (without the 0.005 % of
                  values at each end) or "mse" (the least squared error of rounding)
    include:      patterns of the layers to quantize (see `wrappers.modules.matches`), by default all
    exclude:      patterns of layers to leave as they are
    embeddings:   whether embeddings are quantized, and heads tied to them

    A weight that several modules share stays shared. Layers that would grow are left as they are, and so are those
    whose weight torch's attention reads without calling them; the report names each with the reason. The weights are
    frozen then (but for int8_qat), biases are not. A transformers model's config takes the plan, so that
    `save_pretrained` and `from_pretrained` give the same model.

    Raises ValueError for a scheme or argument that does not fit, patterns that match nothing, layers that are quantized
    already, weights that are not finite (in float16: would not be), and calibration data that is empty or does not fit;
    `model` is then unchanged.
    """
    plan, format = _formats(scheme, double_quant, block_size)
    if plan is None:
        patterns = (as_patterns(include), as_patterns(exclude) or ())
        chosen = select(model, scheme, *patterns, embeddings=embeddings)
        formats = dict.fromkeys(chosen.layers, format)
    else:
        if include is not None or exclude or not embeddings:
            raise ValueError("include, exclude and embeddings are not for a Plan, which names its layers; drop them")
        chosen = select_named(model, plan.layers)
        formats = {name: plan.format(name) for name in chosen.layers}
        _check_ties(plan, chosen, formats)
    _check_weights(chosen.layers)
    made = _build(chosen, formats)
    if plan is None and format is not None and format.scheme != "int8_qat":
        _leave_growing(chosen, made)
    static = {name: layer for name, layer in made.items() if isinstance(layer, LinearInt8) and layer.static}
    _calibrate(model, static, formats, calibration, observer)
    return _install(model, made, chosen)


def convert_qat(model: nn.Module) -> QuantizationReport:
    """Make each layer that `quantize(model, "int8_qat")` prepared int8_dynamic, in place.

    The model computes as the prepared one did without gradients, to the bit. Raises ValueError where no
    layer is prepared; the model is then unchanged.
    """
    kinds = (FakeQuantizedLinear, FakeQuantizedEmbedding)
    names = [name for name, module in model.named_modules() if isinstance(module, kinds)]
    if not names:
        raise ValueError("no layer is prepared for int8_qat; call quantize(model, 'int8_qat') and train first")
    chosen = _prepared(model, names)
    _check_weights(chosen.layers)
    made = _build(chosen, dict.fromkeys(names, Format("int8_dynamic")))
    return _install(model, made, chosen)


def _prepared(model: nn.Module, names: list[str]) -> Selection:
    layers = {name: model.get_submodule(name) for name in names}
    first: dict[int, str] = {}
    for name in sorted(names, key=lambda name: not isinstance(layers[name], nn.Embedding)):
        first.setdefault(id(layers[name].weight), name)
    owners = {name: first[id(layers[name].weight)] for name in names}
    return Selection(layers, {}, {name: owner for name, owner in owners.items() if owner != name})


def _formats(scheme: str | Plan, double_quant: bool, block_size: int | None) -> tuple[Plan | None, Format | None]:
    if isinstance(scheme, Plan):
        if double_quant or block_size is not None:
            raise ValueError("double_quant and block_size are not for a Plan, which has each layer's; leave them out")
        return scheme, None
    return None, Format(scheme, block_size, double_quant or None)


def _check_ties(plan: Plan, chosen: Selection, formats: dict[str, Format]) -> None:
    for name, layer in chosen.layers.items():
        owner = chosen.owners.get(name, name)
        told = plan.shares(name)
        if told is not None and layer.weight is not chosen.layers[told].weight:
            raise ValueError(f"the plan says that {name!r} shares the weight of {told!r}; in this model it does not")
        # A table in int8 takes no input, so its scheme says nothing of one.
        mine, theirs = (formats[n].scheme.replace("int8_static", "int8_dynamic") for n in (name, owner))
        if (mine, formats[name].entry() | {"scheme": ""}) != (theirs, formats[owner].entry() | {"scheme": ""}):
            raise ValueError(
                f"{name!r} and {owner!r} share a weight, and the plan has {formats[name].entry()} and "
                f"{formats[owner].entry()} for them; give both the same"
            )


def _check_weights(layers: dict[str, nn.Module]) -> None:
    for name, layer in layers.items():
        weight = layer.weight
        assert isinstance(weight, torch.Tensor)
        if weight.is_meta:
            raise ValueError(f"{name}.weight lies on the meta device and has no values; load the model first")
        if not bool(weight.isfinite().all()):
            raise ValueError(f"{name}.weight holds NaN or infinity, which have no levels; mend it or exclude it")


@torch.no_grad()
def _build(chosen: Selection, formats: dict[str, Any]) -> dict[str, nn.Module]:
    made: dict[str, nn.Module] = {}
    for name, layer in chosen.layers.items():
        try:
            made[name] = formats[name].of(layer)
        except ValueError as problem:
            raise ValueError(f"{name}: {problem}; or exclude it") from problem
    for name, owner in chosen.owners.items():
        share(made[name], made[owner])
    for name, layer in chosen.layers.items():
        take_hooks(layer, made[name])
    return made


def _leave_growing(chosen: Selection, made: dict[str, nn.Module]) -> None:
    """Take back what would be larger than before, as a few inputs in a whole group are."""
    for name in [name for name in made if name not in chosen.owners]:
        group = [name, *(other for other, owner in chosen.owners.items() if owner == name)]
        before, after = tensor_bytes(chosen.layers[name]), tensor_bytes(made[name])
        if after > before:
            for other in group:
                chosen.skipped[other] = f"it would grow from {before:,} to {after:,} bytes"
                chosen.layers.pop(other), made.pop(other), chosen.owners.pop(other, None)
    if not made:
        name, why = next((name, why) for name, why in chosen.skipped.items() if why.startswith("it would grow"))
        raise ValueError(f"no layer is left to quantize ({name}: {why}); take a scheme of more bits or smaller blocks")


def _calibrate(
    model: nn.Module,
    static: dict[str, LinearInt8],
    formats: dict[str, Any],
    calibration: Iterable[Any] | None,
    observer: str | None,
) -> None:
    wanted = any(format is not None and format.scheme == "int8_static" for format in formats.values())
    if not wanted:
        for name, given in (("calibration", calibration), ("observer", observer)):
            if given is not None:
                raise ValueError(f"{name} is for int8_static alone; leave it out")
        return
    if observer is not None and observer not in OBSERVERS:
        raise ValueError(f"observer={observer!r} must be one of {', '.join(map(repr, OBSERVERS))}")
    if calibration is None:
        raise ValueError("int8_static needs calibration: an iterable of batches as the model reads them")
    for name, (scale, zero_point) in input_ranges(model, list(static), calibration, observer or "minmax").items():
        static[name].calibrate(scale, zero_point)


def _install(model: nn.Module, made: dict[str, nn.Module], chosen: Selection) -> QuantizationReport:
    before = tensor_bytes(model)
    layers = []
    for name, new in made.items():
        old, is_shared = chosen.layers[name], name in chosen.owners
        weight = old.weight
        assert isinstance(weight, torch.Tensor)
        held = weight.numel() * weight.element_size() * (not is_shared)
        bits = sum(b.numel() * b.element_size() for b in new.buffers()) if not is_shared else 0
        format = format_of(new)
        assert format is not None
        layers.append(LayerReport(name, format.scheme, weight.numel(), held, bits or held))
    places = {id(layer): name for name, layer in chosen.layers.items()}
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if id(module) in places:
            replace_module(model, name, made[places[id(module)]])
    for name, new in made.items():
        if isinstance(new, (FakeQuantizedLinear, FakeQuantizedEmbedding)):
            hold_zeros(chosen.layers[name], new)
    record(model)
    return QuantizationReport(tuple(layers), before, tensor_bytes(model), dict(chosen.skipped))


def record(model: nn.Module) -> None:
    """Write the plan into a transformers model's config, or take it out where no layer is quantized (any more)."""
    config: Any = getattr(model, "config", None)
    if config is None or not callable(getattr(model, "save_pretrained", None)):
        return
    plan = Plan.of(model)
    # Prepared for training a layer is still a plain one in a checkpoint.
    layers = {name: entry for name, entry in plan.layers.items() if entry["scheme"] != "int8_qat"}
    if layers:
        config.quantization_config = {"quant_method": METHOD, "layers": layers}
        _name_once(model, layers)
    elif getattr(config, "quantization_config", None) is not None:
        del config.quantization_config


def _name_once(model: Any, layers: Iterable[str]) -> None:
    """Let save_pretrained write a quantized module that stands in several places under its first name alone: it would
    refuse tensors that are the same and are not weights."""
    first = {id(model.get_submodule(name)): name for name in layers}
    again = [
        f"{name}.{key}"
        for name, module in model.named_modules(remove_duplicate=False)
        if first.get(id(module), name) != name
        for key in module.state_dict()
    ]
    if again:
        model._keys_to_ignore_on_save = sorted({*(model._keys_to_ignore_on_save or ()), *again})
