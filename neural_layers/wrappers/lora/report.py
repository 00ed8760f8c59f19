"""What adapters cover, in numbers."""

import re
from dataclasses import dataclass
from typing import Any

from torch import nn

from neural_layers.wrappers.modules import tensor_bytes


@dataclass(frozen=True)
class CoveredLayer:
    """A module with an adapter: its name, what its base is, its inputs and outputs, the adapter's rank and size."""

    name: str
    base: str
    inputs: int
    outputs: int
    r: int
    parameters: int


@dataclass(frozen=True)
class CoverageReport:
    """Which modules an adapter changes, and what is left to train.

    layers: the modules. skipped: those that the targets name and that cannot be wrapped, with the reason.
    trainable, total: parameters, counted as numbers of the model, however few bits each has; the adapters included
    trainable_bytes, total_bytes: as they lie in memory
    """

    adapter: str
    layers: tuple[CoveredLayer, ...]
    skipped: dict[str, str]
    trainable: int
    total: int
    trainable_bytes: int
    total_bytes: int

    @property
    def matched(self) -> tuple[str, ...]:
        """The names of the modules."""
        return tuple(layer.name for layer in self.layers)

    @property
    def share(self) -> float:
        """Trainable parameters over all."""
        return self.trainable / self.total

    def __str__(self) -> str:
        groups: dict[tuple[Any, ...], list[CoveredLayer]] = {}
        for layer in self.layers:
            key = (re.sub(r"\.\d+(?=\.|$)", ".*", layer.name), layer.base, layer.inputs, layer.outputs, layer.r)
            groups.setdefault(key, []).append(layer)
        rows = [("module", "base", "in → out", "r", "count", "parameters")]
        for (name, base, inputs, outputs, r), own in groups.items():
            size = sum(layer.parameters for layer in own)
            rows.append((name, base, f"{inputs} → {outputs}", str(r), str(len(own)), f"{size:,}"))
        widths = [max(len(row[i]) for row in rows) for i in range(6)]
        lines = ["  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)).rstrip() for row in rows]
        lines += [f"skipped: {name} ({why})" for name, why in self.skipped.items()]
        lines.append(
            f"adapter {self.adapter!r}: {self.trainable:,} of {self.total:,} parameters train ({self.share:.2%}), "
            f"{self.trainable_bytes:,} of {self.total_bytes:,} bytes"
        )
        return "\n".join(lines)


def count_parameters(model: nn.Module) -> int:
    """The numbers in a model's weights, shared ones once, and those of a quantized weight as many as it stands for."""
    seen: dict[object, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            if parameter is not None:
                seen[id(parameter)] = parameter.numel()
        packed, own = module._buffers.get("weight"), module
        if packed is not None and callable(getattr(module, "dense_weight", None)):
            sizes: Any = (getattr(own, "out_features", None), getattr(own, "in_features", None))
            if None in sizes:
                sizes = (getattr(own, "num_embeddings", 0), getattr(own, "embedding_dim", 0))
            seen[packed.data_ptr() or id(packed)] = sizes[0] * sizes[1]
    return sum(seen.values())


def coverage(
    model: nn.Module, adapter: str, layers: tuple[CoveredLayer, ...], skipped: dict[str, str]
) -> CoverageReport:
    """The report on a model as it is."""
    training = [p for p in model.parameters() if p.requires_grad]
    return CoverageReport(
        adapter=adapter,
        layers=layers,
        skipped=skipped,
        trainable=sum(p.numel() for p in training),
        total=count_parameters(model),
        trainable_bytes=sum(p.numel() * p.element_size() for p in training),
        total_bytes=tensor_bytes(model),
    )
