"""The model that a graph is to equal, and how nearly."""

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from neural_layers.linear_int4 import LinearInt4
from neural_layers.linear_int8 import LinearInt8
from neural_layers.models.export.blocks import rounded
from neural_layers.models.export.products import QUANTIZED as LAYERS
from neural_layers.models.export.tables import QUANTIZED as TABLES
from neural_layers.wrappers.modules import replace_module


@dataclass(frozen=True)
class Tolerance:
    """limit: of the error. is_mean: the error is the root mean square of the difference over that of the output, and
    not the largest difference over the largest magnitude."""

    limit: float
    is_mean: bool = False


# float32, and NF4 and FP4, whose products are of float32: measured 4e-6 at 8 layers.
EXACT = Tolerance(1e-4)
# Activations that the graph rounds to 8 bits and the reference does not: a noise that layers add up, measured
# by its root mean square. A wrong graph is wrong by about 1.
ROUNDED = Tolerance(0.25, is_mean=True)
# Rounded by both in the same way: what differs in the last digit may fall to the next code. Measured: 0.02.
ALIKE = Tolerance(0.1, is_mean=True)


def tolerance(model: nn.Module, quantize: str | None) -> Tolerance:
    """The tolerance that a graph's least exact layers need."""
    kinds = {type(module) for module in model.modules()}
    if quantize is not None or LinearInt4 in kinds:
        return ROUNDED
    return ALIKE if LinearInt8 in kinds else EXACT


def quantized_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    """Names and modules of layers whose weights are quantized; a module that has several names, by each."""
    for name, module in model.named_modules(remove_duplicate=False):
        if type(module) in (*LAYERS, *TABLES):
            yield name, module


def reference(model: nn.Module, quantize: str | None) -> Any:
    """The model that a graph is to equal: itself in float32, with its weights rounded where the graph's are.

    Layers of 4 bits and quantized embeddings become plain ones of the very weight that their bits stand for, so that
    a graph is not compared with kernels that round activations in their own way. LinearInt8 stays: how it rounds
    activations is what the graph has to do.
    """
    is_quantized = any(True for _ in quantized_layers(model))
    if quantize is None and not is_quantized and all(p.dtype == torch.float32 for p in model.parameters()):
        return model
    made = copy.deepcopy(model).to("cpu", torch.float32)
    plain: dict[int, nn.Module] = {}
    for name, module in list(quantized_layers(made)):
        if not isinstance(module, LinearInt8):
            replace_module(made, name, plain.setdefault(id(module), _plain(module)))
    if quantize is not None:
        weights = {id(m.weight): m.weight for m in made.modules() if isinstance(m, nn.Linear | nn.Embedding)}
        with torch.no_grad():
            for weight in weights.values():
                weight.copy_(rounded(weight, quantize))
    return made.eval()


def _plain(module: Any) -> nn.Module:
    """A layer of float32 with the weight of a quantized one."""
    with torch.no_grad():
        weight: Tensor = module.dense_weight()
    if isinstance(module, tuple(TABLES)):
        return nn.Embedding.from_pretrained(weight)
    plain = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
    plain.weight = nn.Parameter(weight, requires_grad=False)
    plain.bias = module.bias
    return plain
