"""Which units are to go: chosen by what makes and what reads them, and kept as a plan that can be replayed."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from neural_layers.errors import InputError
from neural_layers.wrappers.modules import matches, nearest, unmatched_error
from neural_layers.wrappers.pruning.layers import pattern_list
from neural_layers.wrappers.pruning.methods import magnitudes, smallest
from neural_layers.wrappers.pruning.prune import check_amount
from neural_layers.wrappers.pruning.units import KINDS, Part, Units, find_units


@dataclass(frozen=True)
class Kept:
    """Of one module: the kind of its units, how many there were, and the indices of those that stay."""

    kind: str
    units: int
    kept: tuple[int, ...]


@dataclass(frozen=True)
class ShrinkPlan:
    """What `shrink` leaves of each module, by its name. Replayed on another model of the same sizes it gives one into
    which the shrunken model's state dict loads."""

    modules: dict[str, Kept]

    def to_json(self) -> str:
        return json.dumps(
            {name: {"kind": m.kind, "units": m.units, "kept": list(m.kept)} for name, m in self.modules.items()}
        )

    @classmethod
    def from_json(cls, text: str) -> "ShrinkPlan":
        """Raises InputError for a text that `to_json` did not write."""
        try:
            found = json.loads(text)
            return cls({n: Kept(str(m["kind"]), int(m["units"]), tuple(map(int, m["kept"]))) for n, m in found.items()})
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(f"this is no plan of what to shrink ({error}); give what to_json wrote") from error

    def __str__(self) -> str:
        return "\n".join(f"{name}: {len(m.kept)} of {m.units} ({m.kind})" for name, m in self.modules.items())


def unit_scores(units: Units) -> Tensor:
    """The importance of each unit i, (count,): ‖all weights that make it‖₂ · ‖all weights that read it‖₂.

    Norms as in arXiv 1608.08710, of the whole group of what belongs to a unit (arXiv 2305.11627). The product does not
    change where a unit is scaled and its readers are scaled back, which leaves the model's output as it is.
    """
    return _norms(units, "makes").sqrt() * _norms(units, "reads").sqrt()


def _norms(units: Units, role: str) -> Tensor:
    squares = [_squares(part, units.count) for part in units.parts if part.role == role]
    return torch.stack(squares).sum(0)


def _squares(part: Part, count: int) -> Tensor:
    entries = part.tensor.detach().narrow(part.dim, part.start, count * part.block).movedim(part.dim, 0)
    return magnitudes(entries).reshape(count, -1).square().sum(1)


def plan_shrink(
    model: nn.Module,
    amounts: Mapping[str, float],
    *,
    multiple_of: int = 1,
    scores: Mapping[str, Tensor] | None = None,
    include: Iterable[str] | None = None,
    exclude: Iterable[str] = (),
) -> ShrinkPlan:
    """Choose the units that `shrink` removes, the same share in every layer, so that a config with one width fits.

    amounts:     the share of units to remove, in [0, 1), by kind:
                 "feed_forward"  neurons of SwiGLU, GeGLU and Llama's MLP (rows of gate and up, columns of down)
                 "kv_heads"      key/value heads, each with all of its query heads
                 "query_heads"   as many query heads of each key/value head
                 "mamba"         channels of `Mamba`
                 "mamba2"        heads of `Mamba2`, as many of each group
    multiple_of: neurons and channels that stay are rounded up to such a multiple (8 or 16 suits vector units)
    scores:      by the module's name, an importance for each of its units to go by (`measured_scores` has some of
                 data); by default `unit_scores`, norms of the weights
    include, exclude: patterns of the names of the modules ("feed_forward.inner", "layers.0.*")

    Raises ValueError for kinds, shares, patterns and scores that are wrong, for a share of the heads that comes to no
    whole number, for modules that cannot be taken apart, and for two kinds of heads at once.
    """
    _check_amounts(amounts, multiple_of)
    found = {kind: list(find_units(model, kind)) for kind in amounts}
    for kind, listed in found.items():
        if not listed:
            raise ValueError(f"the model has no {kind} to remove: {_what(model)}")
    names = [units.name for listed in found.values() for units in listed]
    wanted, unwanted = pattern_list("include", include), pattern_list("exclude", exclude)
    unmatched = [p for p in (*wanted, *unwanted) if not any(matches(name, p) for name in names)]
    if unmatched:
        raise ValueError(unmatched_error(unmatched, names))
    scores = dict(scores or {})
    stray = [name for name in scores if name not in names]
    if stray:
        raise ValueError(f"scores hold {stray[0]!r}, which has no such units; there are {', '.join(names)}")
    modules: dict[str, Kept] = {}
    for kind, listed in found.items():
        for units in listed:
            is_in = include is None or any(matches(units.name, p) for p in wanted)
            if is_in and not any(matches(units.name, p) for p in unwanted):
                own = _checked_scores(units, scores.get(units.name))
                modules[units.name] = Kept(kind, units.count, _keep(units, amounts[kind], multiple_of, own))
    if not modules:
        raise ValueError("include and exclude leave no module to shrink")
    return ShrinkPlan(modules)


def _check_amounts(amounts: Mapping[str, float], multiple_of: int) -> None:
    if not isinstance(amounts, Mapping) or not amounts or set(amounts) - set(KINDS):
        raise ValueError(f"amounts={amounts!r} must give shares to some of {', '.join(KINDS)}: {{'mamba': 0.5}}")
    for kind, amount in amounts.items():
        check_amount(kind, amount)
    if {"kv_heads", "query_heads"} <= set(amounts):
        raise ValueError("kv_heads and query_heads both index the query heads; shrink the one, then the other")
    if isinstance(multiple_of, bool) or not isinstance(multiple_of, int) or multiple_of < 1:
        raise ValueError(f"multiple_of={multiple_of!r} must be a positive integer")


def _what(model: nn.Module) -> str:
    known: dict[str, int] = {}
    for kind in KINDS:
        try:
            known[kind] = sum(1 for _ in find_units(model, kind))
        except ValueError as error:
            return str(error)
    told = ", ".join(f"{kind} in {count} modules" for kind, count in known.items() if count)
    return f"there are {told}" if told else "no module of it has units that are known here"


def _checked_scores(units: Units, given: Tensor | None) -> Tensor:
    if given is None and any(part.tensor.is_meta for part in units.parts):
        raise ValueError(f"the weights of {units.name} are on the meta device; load them, or give scores")
    scores = unit_scores(units) if given is None else torch.as_tensor(given)
    if tuple(scores.shape) != (units.count,):
        raise ValueError(f"scores of {units.name} have shape {tuple(scores.shape)}; it has {units.count} units")
    if not scores.isfinite().all():
        raise ValueError(f"scores of {units.name} hold NaN or infinity; load weights that are finite")
    return scores


def _keep(units: Units, amount: float, multiple_of: int, scores: Tensor) -> tuple[int, ...]:
    of_each = units.count // units.groups
    removed = round(amount * of_each)
    if units.exact and abs(amount * of_each - removed) > 1e-6:
        within = f" of each of its {units.groups} groups" if units.groups > 1 else ""
        possible = ", ".join(f"{i / of_each:.4g}" for i in range(1, of_each)) or "none"
        raise ValueError(
            f"{units.kind}={amount} of the {of_each} heads{within} in {units.name} is no whole number; possible are "
            f"{possible}"
        )
    if not units.exact:
        removed = max(units.count - -(-(units.count - removed) // multiple_of) * multiple_of, 0)
    if removed >= of_each:
        raise ValueError(f"{units.kind}={amount} would leave nothing of the {of_each} units in {units.name}")
    lost = torch.stack([smallest(group, removed) for group in scores.view(units.groups, of_each)])
    return tuple((~lost).flatten().nonzero().flatten().tolist())


def resolve(model: nn.Module, plan: ShrinkPlan) -> list[tuple[Units, Kept]]:
    """The units of the model that a plan speaks of; raises InputError where the plan is of another model."""
    found: dict[str, dict[str, Any]] = {kind: {} for kind in {m.kind for m in plan.modules.values()}}
    for kind, own in found.items():
        own.update({units.name: units for units in find_units(model, kind)})
    resolved = []
    for name, kept in plan.modules.items():
        units = found.get(kept.kind, {}).get(name)
        if units is None:
            alike = nearest(name, [n for own in found.values() for n in own])
            raise InputError(f"the plan removes {kept.kind} of {name!r}, which this model has not; nearest: {alike}")
        fits = kept.kept == tuple(sorted(set(kept.kept))) and all(0 <= i < units.count for i in kept.kept)
        if units.count != kept.units or not kept.kept or not fits:
            raise InputError(f"the plan is of a {name} with {kept.units} {kept.kind}, and this one has {units.count}")
        of_each = units.count // units.groups
        per = [sum(i // of_each == group for i in kept.kept) for group in range(units.groups)]
        if len(set(per)) > 1:
            raise InputError(f"the plan keeps unequal numbers of heads, {per}, in the groups of {name}")
        resolved.append((units, kept))
    return resolved
