"""Remove units: the matrices become smaller, and with them the model's file, its memory and its time."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from neural_layers.wrappers.modules import tensor_bytes, tied
from neural_layers.wrappers.pruning.fields import changed_config
from neural_layers.wrappers.pruning.masks import hold, mask_of, release
from neural_layers.wrappers.pruning.plan import Kept, ShrinkPlan, plan_shrink, resolve
from neural_layers.wrappers.pruning.saving import record
from neural_layers.wrappers.pruning.units import Units

_Key = tuple[int, str, int]


@dataclass(frozen=True)
class ShrinkReport:
    """What was removed, and the size before and after; `str` prints it. `compare_sizes` measures what it buys in time.

    plan: which units stayed. config: the fields of the model's config that changed, with their new values
    """

    plan: ShrinkPlan
    config: dict[str, Any]
    parameters_before: int
    parameters_after: int
    bytes_before: int
    bytes_after: int

    @property
    def ratio(self) -> float:
        """Bytes before, over bytes after."""
        return self.bytes_before / max(self.bytes_after, 1)

    def __str__(self) -> str:
        fields = ", ".join(f"{name}={value}" for name, value in self.config.items()) or "none"
        return (
            f"{self.plan}\nparameters: {self.parameters_before:,} → {self.parameters_after:,}\n"
            f"bytes:      {self.bytes_before:,} → {self.bytes_after:,} ({self.ratio:.2f}×)\nconfig:     {fields}"
        )


@torch.no_grad()
def shrink(model: nn.Module, what: ShrinkPlan | Mapping[str, float], **options: Any) -> ShrinkReport:
    """Remove units from the matrices of `model`, in place.

    what:    a plan, or the shares by kind that `plan_shrink` takes, with its `options`

    The output is that of the model in which the weights of these units are zero (`mask_units`). A transformers model's
    config takes the new widths, so that `save_pretrained` and `from_pretrained` work as before; caches follow from
    them. Of a model without a config, keep the plan: `shrink(fresh, plan)` makes one that the state dict fits. Masks of
    `prune` are cut as the weights are. Optimisers must be made anew: the parameters are others.

    Raises ValueError (InputError for a plan of another model) where something does not fit: a config that cannot
    describe the result, because its one width is that of all layers; a weight that other modules share; quantized
    layers and adapters. The model is then as it was.
    """
    if isinstance(what, ShrinkPlan):
        if options:
            raise ValueError(f"{sorted(options)[0]} is for choosing units, and a plan has chosen; leave it out")
        plan = what
    else:
        plan = plan_shrink(model, what, **options)
    resolved = resolve(model, plan)
    indices = kept_indices(resolved)
    _refuse_shared(model, resolved)
    changes = changed_config(model, resolved, {key: len(index) for key, (_, index) in indices.items()})
    before = sum(p.numel() for p in model.parameters()), tensor_bytes(model)

    for (_, name, dim), (owner, index) in indices.items():
        _cut(owner, name, dim, index)
    for units, kept in resolved:
        units.finish(len(kept.kept))
    for field, value in changes.items():
        setattr(model.config, field, value)
    record(model)
    after = sum(p.numel() for p in model.parameters()), tensor_bytes(model)
    return ShrinkReport(plan, changes, before[0], after[0], before[1], after[1])


@torch.no_grad()
def mask_units(model: nn.Module, plan: ShrinkPlan) -> None:
    """Set to zero, in place, all weights that make or read the units which `plan` removes; shapes stay.

    The definition of what `shrink` computes; and a way to see what a removal costs before it is done.
    """
    for units, kept in resolve(model, plan):
        gone = _gone(units, kept)
        for part in units.parts:
            if part.role in ("makes", "reads"):
                part.tensor.data.index_fill_(part.dim, _entries(part.start, part.block, gone, part.tensor), 0)


def kept_indices(resolved: list[tuple[Units, Kept]]) -> dict[_Key, tuple[nn.Module, Tensor]]:
    """By module, parameter and dimension: the module, and the indices along it that stay."""
    owners: dict[_Key, nn.Module] = {}
    stay: dict[_Key, Tensor] = {}
    for units, kept in resolved:
        gone = _gone(units, kept)
        for part in units.parts:
            key = (id(part.owner), part.name, part.dim)
            owners[key] = part.owner
            stays = stay.setdefault(key, torch.ones(part.tensor.shape[part.dim], dtype=torch.bool))
            stays[_entries(part.start, part.block, gone)] = False
    return {key: (owners[key], stays.nonzero().flatten()) for key, stays in stay.items()}


def _gone(units: Units, kept: Kept) -> Tensor:
    return torch.tensor(sorted(set(range(units.count)) - set(kept.kept)), dtype=torch.long)


def _entries(start: int, block: int, units: Tensor, like: Tensor | None = None) -> Tensor:
    index = (start + units.unsqueeze(1) * block + torch.arange(block)).flatten()
    return index if like is None else index.to(like.device)


def _refuse_shared(model: nn.Module, resolved: list[tuple[Units, Kept]]) -> None:
    shared = tied(model)
    for units, _ in resolved:
        for part in units.parts:
            if id(part.tensor) in shared:
                holders = ", ".join(shared[id(part.tensor)])
                raise ValueError(
                    f"{part.name} of {units.name} is shared by {holders}: give each its own, or exclude it"
                )


def _cut(owner: Any, name: str, dim: int, index: Tensor) -> None:
    """Put the kept entries in the place of a parameter, of its mask, and of what the module says of its sizes."""
    old, mask = owner.get_parameter(name), mask_of(owner) if name == "weight" else None
    if mask is not None:
        release(owner)
    new = old.detach().index_select(dim, index.to(old.device))
    owner._parameters[name] = nn.Parameter(new, requires_grad=old.requires_grad)
    if mask is not None:
        hold(owner, mask.index_select(dim, index.to(mask.device)))
    if isinstance(owner, nn.Linear):
        owner.out_features, owner.in_features = owner.weight.shape
    elif isinstance(owner, nn.Conv1d):  # depthwise
        owner.in_channels = owner.out_channels = owner.groups = owner.weight.shape[0]
