"""Set weights to zero and keep them there: `prune`."""

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from neural_layers.errors import InputError
from neural_layers.wrappers.pruning.layers import chosen
from neural_layers.wrappers.pruning.masks import hold, mask_of
from neural_layers.wrappers.pruning.methods import (
    keep_largest,
    keep_largest_slices,
    keep_n_of_m,
    magnitudes,
    random_scores,
)
from neural_layers.wrappers.pruning.report import PruningReport, report_of
from neural_layers.wrappers.pruning.saving import noted_without_masks, record

_OPTIONS = {
    "l1": ("amount", "scope", "of"),
    "random": ("amount", "scope", "of", "seed"),
    "ln_structured": ("amount", "of", "n", "dim"),
    "n:m": ("pattern",),
}
_DEFAULTS: dict[str, Any] = {"scope": "layer", "of": "whole", "seed": 0, "n": 2, "dim": 0, "pattern": (2, 4)}


@torch.no_grad()
def prune(
    model: nn.Module,
    method: str = "l1",
    amount: float | None = None,
    *,
    scope: str | None = None,
    of: str | None = None,
    n: float | None = None,
    dim: int | None = None,
    pattern: tuple[int, int] | None = None,
    seed: int | None = None,
    include: Iterable[str] | None = None,
    exclude: Iterable[str] = (),
    kinds: Sequence[str] = ("linear",),
) -> PruningReport:
    """Set weights of `model` to zero, in place, and hold them there while it is trained (see `masks`).

    method:  "l1"             the weights of the smallest magnitude |w|
             "random"         weights drawn with `seed` (0), the same on every device
             "ln_structured"  whole slices along `dim` (0: rows, the outputs; 1: the inputs) of the smallest norm ‖·‖_n
                              (2)
             "n:m"            all but the n largest of each m consecutive inputs of a matrix; pattern=(n, m), (2, 4)
    amount:  the share to prune, in [0, 1), rounded to whole weights or slices; of "n:m" it is 1 − n/m, and may be left
             out
    of:      what `amount` is a share of. "whole" (default): all weights, so that 0.5 and then 0.7 leaves 30 %, and 0.5
             twice is 0.5 once. "remaining": those that no mask holds at zero yet, so that 0.5 twice leaves 25 %.
    scope:   of "l1" and "random": "layer" (default), `amount` of each layer; "global", `amount` of all together, by one
             order of all weights
    include, exclude: patterns of layers' names (see `wrappers.modules.matches`); by default all of `kinds`
    kinds:   "linear", "conv", "embedding". A weight that several layers share is pruned once. One shared with an
             embedding (a tied head) is pruned where "embedding" is among the kinds.

    Only the weight's zeros are saved, under its usual name; `restore_masks` finds the masks again in a loaded model.
    Zeros in an ordinary matrix make it neither smaller nor faster: `shrink` removes whole units.

    Returns the sparsity of each layer that was meant. Raises ValueError for options that are wrong or that the method
    does not take, patterns that match no layer, layers that cannot be pruned, weights that are not finite, a whole of
    which more is pruned already, a loaded model whose masks were not restored, and where nothing would be left of a
    layer; the model is then as it was.
    """
    given = {"amount": amount, "scope": scope, "of": of, "n": n, "dim": dim, "pattern": pattern, "seed": seed}
    options = _checked(method, given)
    noted = noted_without_masks(model)
    if noted:
        raise InputError(
            f"the model's config notes {noted[0]} and {len(noted) - 1} more as pruned, and no mask holds them: call "
            "restore_masks(model) first, or unprune(model) to begin anew"
        )
    layers, skipped = chosen(model, kinds, include, exclude)
    for name, module in layers.items():
        if not module.get_parameter("weight").isfinite().all():
            raise ValueError(f"the weight of {name} holds NaN or infinity; load weights that are finite")
    after = _masks(method, layers, options)
    for name, mask in after.items():
        if not mask.any():
            raise ValueError(
                f"nothing would be left of {name}; exclude it, or take a smaller amount"
                + (", or scope='layer'" if options.get("scope") == "global" else "")
            )
    for name, module in layers.items():
        hold(module, after[name])
    record(model)
    return report_of(model, layers, skipped)


def _checked(method: str, given: dict[str, Any]) -> dict[str, Any]:
    """The method's options, with defaults for those not given; raises ValueError for wrong and unknown ones."""
    if method not in _OPTIONS:
        raise ValueError(f"method={method!r} must be one of {', '.join(_OPTIONS)}")
    if method == "n:m":
        _check_pattern(given["pattern"] or _DEFAULTS["pattern"], given["amount"])
        given = {**given, "amount": None}
    for name, value in given.items():
        if value is not None and name not in _OPTIONS[method]:
            raise ValueError(f"{name}={value!r} is no option of method={method!r}; leave it out")
    options = {
        name: _DEFAULTS.get(name) if given[name] is None else given[name] for name in given if name in _OPTIONS[method]
    }
    if "amount" in options:
        check_amount("amount", options["amount"])
    for name, allowed in (("scope", ("layer", "global")), ("of", ("whole", "remaining"))):
        if name in options and options[name] not in allowed:
            raise ValueError(f"{name}={options[name]!r} must be one of {', '.join(allowed)}")
    if "n" in options and (not isinstance(options["n"], (int, float)) or not options["n"] > 0):
        raise ValueError(f"n={options['n']!r} must be positive: 1, 2 or inf, say")
    return options


def _check_pattern(pattern: Any, amount: Any) -> None:
    """Raise ValueError for a wrong pattern (n, m), and for an amount that is not the one it has."""
    whole = isinstance(pattern, (tuple, list)) and len(pattern) == 2 and all(isinstance(i, int) for i in pattern)
    if not whole or not 0 < pattern[0] < pattern[1]:
        raise ValueError(f"pattern={pattern!r} must be (n, m) with 0 < n < m: (2, 4), say")
    n, m = pattern
    if amount is not None and amount != 1 - n / m:
        raise ValueError(f"amount={amount!r} is not that of pattern={(n, m)}, which is {1 - n / m:g}; leave it out")


def check_amount(name: str, amount: Any) -> None:
    """Raise ValueError unless `amount` is a number in [0, 1)."""
    if isinstance(amount, bool) or not isinstance(amount, (int, float)) or math.isnan(amount) or not 0 <= amount < 1:
        raise ValueError(f"{name}={amount!r} must be a number in [0, 1): 0.5 prunes half")


def _masks(method: str, layers: dict[str, nn.Module], options: dict[str, Any]) -> dict[str, Tensor]:
    weights = {name: module.get_parameter("weight") for name, module in layers.items()}
    before = {name: _before(module) for name, module in layers.items()}
    if method == "n:m":
        return {name: _n_of_m(name, weights[name], before[name], *options["pattern"]) for name in layers}
    if method == "ln_structured":
        return {name: _slices(name, weights[name], before[name], options) for name in layers}
    if method == "l1":
        scores = {name: magnitudes(weight) for name, weight in weights.items()}
    else:
        scores = dict(zip(weights, random_scores(list(weights.values()), options["seed"]), strict=True))
    amount, of = options["amount"], options["of"]
    if options["scope"] == "layer":
        return {
            name: keep_largest(scores[name], before[name], _count(name, before[name], amount, of)) for name in layers
        }
    device = next(iter(scores.values())).device
    # One order of all weights: as if they lay one behind the other.
    flat = torch.cat([score.flatten().to(device) for score in scores.values()])
    held = torch.cat([mask.flatten().to(device) for mask in before.values()])
    kept = keep_largest(flat, held, _count("the layers together", held, amount, of))
    parts = kept.split([score.numel() for score in scores.values()])
    return {name: part.view_as(before[name]).to(before[name].device) for name, part in zip(layers, parts, strict=True)}


def _before(module: nn.Module) -> Tensor:
    mask = mask_of(module)
    return torch.ones_like(module.get_parameter("weight"), dtype=torch.bool) if mask is None else mask


def _count(name: str, remains: Tensor, amount: float, of: str) -> int:
    """How many of these entries (true where they remain) are to be pruned, those that already are included."""
    pruned = int((~remains).sum())
    if of == "remaining":
        return pruned + round(amount * (remains.numel() - pruned))
    count = round(amount * remains.numel())
    if count < pruned:
        raise ValueError(
            f"amount={amount} of the whole is less than the {pruned / remains.numel():.4g} that is pruned already of "
            f"{name}; take a larger one, or of='remaining', or unprune(model) first"
        )
    return count


def _slices(name: str, weight: Tensor, before: Tensor, options: dict[str, Any]) -> Tensor:
    dim = options["dim"]
    if isinstance(dim, bool) or not isinstance(dim, int) or not -weight.ndim <= dim < weight.ndim:
        raise ValueError(f"dim={dim!r} is no dimension of {name}, whose weight has shape {tuple(weight.shape)}")
    dim %= weight.ndim
    remains = before.any(dim=[i for i in range(weight.ndim) if i != dim])
    count = _count(name, remains, options["amount"], options["of"])
    return keep_largest_slices(weight, before, count, options["n"], dim)


def _n_of_m(name: str, weight: Tensor, before: Tensor, n: int, m: int) -> Tensor:
    if weight.ndim != 2:
        raise ValueError(f"{name} has a weight of shape {tuple(weight.shape)}; 'n:m' takes matrices, so exclude it")
    if weight.shape[1] % m:
        raise ValueError(
            f"{name} has {weight.shape[1]} inputs, which are no multiple of m={m}; exclude it, or take another pattern"
        )
    return keep_n_of_m(weight, before, n, m)
