"""Trying a quantization on a model that must stay as it is: copies that share its tensors, and what they answer."""

import copy
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from neural_layers.errors import InputError
from neural_layers.wrappers.quantization.calibration import each, feed
from neural_layers.wrappers.quantization.plan import Plan
from neural_layers.wrappers.quantization.quantize import quantize


def shell(model: nn.Module) -> nn.Module:
    """A copy of the modules that holds the very parameters and buffers of `model`: what is replaced in it costs memory,
    what is not costs none."""
    own: dict[int, Any] = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    return copy.deepcopy(model, own)


def quantized_shell(model: nn.Module, scheme: str | Plan, **options: Any) -> nn.Module:
    """`quantize(…)` of a shell of `model`, which stays as it is; `calibration` goes only to what asks for it."""
    if not wants_calibration(scheme):
        options.pop("calibration", None)
    made = shell(model)
    quantize(made, scheme, **options)
    return made


def wants_calibration(scheme: str | Plan) -> bool:
    """Whether `quantize` asks for calibration data."""
    if isinstance(scheme, Plan):
        return any(scheme.format(name).scheme == "int8_static" for name in scheme.layers)
    return scheme == "int8_static"


def as_batches(name: str, batches: Iterable[Any]) -> list[Any]:
    """All batches, held. Raises InputError where there is none."""
    held = list(each(name, batches))
    if not held:
        raise InputError(f"{name} has no batch; give at least one (an iterator is empty once it was read)")
    return held


def run(model: nn.Module, batch: Any) -> Any:
    """`model(**batch)` for a dict, `model(*batch)` for a tuple or list, otherwise `model(batch)`."""
    if isinstance(batch, Mapping):
        return model(**batch)
    return model(*batch) if isinstance(batch, (tuple, list)) else model(batch)


def logits(model: nn.Module, batch: Any) -> Tensor:
    """The output's `logits`, or the output itself, or its first tensor.

    Raises InputError for a batch that the model refuses, an output without a tensor, and one with NaN or infinity.
    """
    output = feed(model, batch)
    found = getattr(output, "logits", output)
    if not isinstance(found, Tensor):
        values = found.values() if isinstance(found, Mapping) else found if isinstance(found, (tuple, list)) else ()
        found = next((value for value in values if isinstance(value, Tensor) and value.is_floating_point()), None)
    if found is None:
        raise InputError(f"the model returns a {type(output).__name__} without logits or another tensor to compare")
    if not bool(found.isfinite().all()):
        raise InputError("the model's output holds NaN or infinity; give it other inputs, or mend the model")
    return found


def rows(batch: Any) -> int:
    """The first size of the first tensor of a batch."""
    if isinstance(batch, Tensor):
        return batch.shape[0] if batch.ndim else 1
    values = batch.values() if isinstance(batch, Mapping) else batch
    return next((rows(value) for value in values if isinstance(value, Tensor)), 1)


@contextmanager
def evaluating(*models: nn.Module) -> Iterator[None]:
    """Evaluation mode without gradients; each module gets back the mode it had."""
    modes = [(module, module.training) for model in models for module in model.modules()]
    for model in models:
        model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
