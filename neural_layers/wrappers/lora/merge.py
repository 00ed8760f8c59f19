"""Adapters added into the weights, taken out again, or left in for good."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from neural_layers.errors import InputError
from neural_layers.linear import dense_weight
from neural_layers.wrappers.lora.apply import unwrap
from neural_layers.wrappers.lora.layer import LoRALayer, Merge
from neural_layers.wrappers.lora.requantizing import with_weight
from neural_layers.wrappers.lora.switching import Names, weights_of
from neural_layers.wrappers.lora.targets import adapted
from neural_layers.wrappers.lora.tying import holders, part_quantized, set_tied


@dataclass(frozen=True)
class MergeReport:
    """How near the weights of merged layers are to what they should be.

    errors: by layer, the root mean square of W' − (W + ΔW) over that of W + ΔW, in float64. W' is rounded to the dtype
    of a float layer, quantized again where the base is, and zero where a mask of `prune` holds it; 0 where a weight was
    put back to its very bits.
    bases: by layer, what it is.
    """

    errors: dict[str, float]
    bases: dict[str, str]

    @property
    def worst(self) -> float:
        """The largest error."""
        return max(self.errors.values(), default=0.0)

    def __str__(self) -> str:
        kinds = dict.fromkeys(self.bases.values())
        lines = []
        for kind in kinds:
            own = [self.errors[name] for name, base in self.bases.items() if base == kind]
            mean = sum(own) / len(own)
            lines.append(f"{kind}: {len(own)} layers, relative error {mean:.2e} on average, {max(own):.2e} at most")
        return "\n".join(lines)


def merge_lora(
    model: nn.Module, names: Names | None = None, *, untie: bool = False, restorable: bool = True
) -> MergeReport:
    """Add adapters into the weights, so that the layers take no more time than without them.

    names:      as in `set_adapter`; by default those in use
    untie:      give a layer whose weight another module shares one of its own (and, of a transformers model, set the
                config's tie_word_embeddings to False); by default such a layer is an error, as the other module would
                change with it
    restorable: keep the weights as they were, for `unmerge_lora`; it takes their memory again
    W + ΔW is computed in float64 and rounded once to the dtype of W, or quantized again as W was. What is pruned stays
    pruned: of a layer that holds a mask, the ΔW of pruned weights is lost, and counts as error.

    Raises InputError, with the model as it was, where adapters are merged already, none is in use, a weight is tied,
    or a merged weight is not finite.
    """
    layers = adapted(model)
    for name, layer in layers.items():
        if layer.merged is not None:
            told = ", ".join(repr(own) for own, _ in layer.merged.weights)
            raise InputError(f"{told} is merged into {name} already; unmerge_lora(model) before it is merged again")
        if layer.selection.rows is not None or layer.selection.is_disabled:
            raise InputError("adapters are chosen by rows or disabled; leave that block before they are merged")
    named = None if names is None else weights_of(model, names)
    weights = {name: layer.selection.weights if named is None else named for name, layer in layers.items()}
    chosen = {name: layer for name, layer in layers.items() if layer.chosen(weights[name])}
    if not chosen:
        raise InputError("no adapter is in use; set_adapter(model, name), or name what to merge")
    shared = {name: others for name, layer in chosen.items() if (others := holders(model, layer))}
    if shared and not untie:
        name, others = next(iter(shared.items()))
        raise InputError(
            f"the weight of {name} is also that of {', '.join(others)}, which a merge would change or part from it; "
            "give untie=True for a weight of its own, or leave it out of target_modules"
        )
    made = {name: _merged(name, layer, weights[name]) for name, layer in chosen.items()}
    for name, layer in layers.items():
        original = layer.base_layer if restorable else None
        if name in made:
            layer.merged, layer.base_layer = Merge(original, weights[name], name in shared), made[name][0]
        else:  # its adapters are not among the merged ones, and so act no longer
            layer.merged = Merge(original, ())
    if shared:
        set_tied(model, False)
    bases = {name: type(layer.base_layer).__name__ for name, layer in chosen.items()}
    return MergeReport({name: error for name, (_, error) in made.items()}, bases)


@torch.no_grad()
def _merged(name: str, layer: LoRALayer, weights: tuple[tuple[str, float], ...]) -> tuple[nn.Module, float]:
    """The base of a layer with its adapters in the weight, and the error of that weight."""
    exact = layer.changed(layer.chosen(weights), torch.float64)
    if not exact.isfinite().all():
        raise InputError(f"the weight of {name} with its adapter is not finite; was the adapter trained to its end?")
    base = with_weight(layer.base_layer, exact)
    error = relative_error(dense_weight(base), exact)
    if not error < float("inf"):
        raise InputError(
            f"the weight of {name} with its adapter is beyond the range of {layer.base_layer.weight.dtype}"
        )
    return base.train(layer.training), error


def relative_error(weight: Tensor, exact: Tensor) -> float:
    """The root mean square of the difference over that of `exact`, in float64."""
    scale = exact.square().mean().sqrt().clamp_min(torch.finfo(torch.float64).tiny)
    return float((weight.double() - exact).square().mean().sqrt() / scale)


def unmerge_lora(model: nn.Module) -> MergeReport:
    """Take merged adapters out: the weights have the bits that they had before, and the adapters are in use again.

    Raises InputError where nothing is merged, and for what was merged with restorable=False.
    """
    layers = adapted(model)
    merged = {name: layer for name, layer in layers.items() if layer.merged is not None}
    if not merged:
        raise InputError("nothing is merged; merge_lora(model) does")
    for name, layer in merged.items():
        if layer.merged is not None and layer.merged.original is None:
            raise InputError(f"{name} was merged with restorable=False: its weight as it was is gone; load it again")
        if layer.merged is not None and type(layer.base_layer) is not type(layer.merged.original):
            raise InputError(
                f"{name} was made a {type(layer.base_layer).__name__} after the merge, and its weight from before is "
                "of another kind; fold_lora(model) keeps it as it is; quantize before a merge that is to be undone"
            )
    were_tied = [_restored(layer) for layer in merged.values()]
    if any(were_tied):
        set_tied(model, True)
    bases = {name: type(layer.base_layer).__name__ for name, layer in merged.items()}
    return MergeReport(dict.fromkeys(merged, 0.0), bases)


def _restored(layer: LoRALayer) -> bool:
    """Put the base of a merged layer back; whether its weight is a tied one."""
    assert layer.merged is not None
    assert layer.merged.original is not None
    original, like, was_tied = layer.merged.original, layer.base_layer.weight, layer.merged.was_tied
    if original is not layer.base_layer:
        # The model may have moved meanwhile, and with it what is registered, which this is not.
        original.to(like.device)
        if like.is_floating_point():
            original.to(like.dtype)
    layer.base_layer, layer.merged = original.train(layer.training), None
    return was_tied


def fold_lora(model: nn.Module, names: Names | None = None, *, untie: bool = False) -> MergeReport:
    """Merge (unless it is done) and put plain modules in the places of the wrappers: a model without adapters.

    names, untie: of `merge_lora`. Other adapters are gone with the wrappers. Raises InputError as `merge_lora`, and for
    names beside adapters that are merged already.
    """
    layers = adapted(model)
    if any(layer.merged is not None for layer in layers.values()):
        if names is not None:
            raise InputError("adapters are merged already; leave `names` out to keep these, or unmerge_lora(model)")
        report = MergeReport({}, {})
    else:
        report = merge_lora(model, names, untie=untie, restorable=False)
    unwrap(model, list(layers.values()))
    part_quantized(model)
    return report
