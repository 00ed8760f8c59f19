"""The importance of units on data."""

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from neural_layers.wrappers.pruning.units import KINDS, Part, Units, find_units
from neural_layers.wrappers.quantization.trials import as_batches, evaluating, run


def measured_scores(model: nn.Module, kinds: Iterable[str], batches: Iterable[Any]) -> dict[str, Tensor]:
    """How much each unit adds to the output of its module: scores for `plan_shrink`, by the module's name.

    The score of unit i is sqrt(Σ_j ‖W[:, j]‖² · Σ_t x_tj²) over its columns j of the last projection W, whose inputs at
    all tokens t are x: weight times activation, as in Wanda (arXiv 2306.11695), for whole units.

    kinds:   of units, as in `plan_shrink`
    batches: inputs of the model: a dict is `model(**batch)`, a tuple `model(*batch)`, a tensor `model(batch)`. Every
             token counts, padding too

    The model stays as it is. Raises ValueError for an unknown kind and where the model has no such units, InputError
    without batches.
    """
    kinds = [kinds] if isinstance(kinds, str) else list(kinds)
    unknown = [kind for kind in kinds if kind not in KINDS]
    if unknown:
        raise ValueError(f"kind {unknown[0]!r} must be one of {', '.join(KINDS)}")
    found = [units for kind in kinds for units in find_units(model, kind)]
    if not found:
        raise ValueError(f"the model has no units of kinds {kinds}")
    held = as_batches("batches", batches)
    squares: dict[str, Tensor] = {}

    def listen(units: Units) -> Any:
        def add(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            x = inputs[0].detach().double().flatten(0, -2)
            squares[units.name] = squares.get(units.name, 0) + x.square().sum(0)

        return _last(units).owner.register_forward_pre_hook(add)

    hooks = [listen(units) for units in found]
    try:
        with evaluating(model):
            for batch in held:
                run(model, batch)
    finally:
        for hook in hooks:
            hook.remove()
    return {units.name: _scores(units, squares.get(units.name)) for units in found}


def _last(units: Units) -> Part:
    """The projection that reads the units and makes the module's output."""
    return [part for part in units.parts if part.role == "reads"][-1]


def _scores(units: Units, squares: Tensor | None) -> Tensor:
    if squares is None:
        raise ValueError(f"{units.name} was not called on these batches; give inputs that reach it, or exclude it")
    part = _last(units)
    columns = part.tensor.detach().double().square().sum(0) * squares
    return columns.view(units.count, part.block).sum(1).sqrt()
