"""How many weights of which layers are zero."""

from dataclasses import dataclass, field
from math import prod

from torch import nn

from neural_layers.wrappers.pruning.layers import prunable


@dataclass(frozen=True)
class LayerSparsity:
    """Of one layer: its name, the shape of its weight and how many of them are zero."""

    name: str
    shape: tuple[int, ...]
    zeros: int

    @property
    def weights(self) -> int:
        return prod(self.shape)

    @property
    def sparsity(self) -> float:
        return self.zeros / self.weights


@dataclass(frozen=True)
class PruningReport:
    """Sparsity of each layer that can be pruned, and of all of them together; `str` prints the table.

    layers:     one `LayerSparsity` for each weight, one that several layers share once
    skipped:    layers that were left alone, with the reason
    parameters: of the whole model, what cannot be pruned included
    """

    layers: tuple[LayerSparsity, ...]
    parameters: int
    skipped: dict[str, str] = field(default_factory=dict)

    @property
    def weights(self) -> int:
        """All weights of the layers."""
        return sum(layer.weights for layer in self.layers)

    @property
    def zeros(self) -> int:
        return sum(layer.zeros for layer in self.layers)

    @property
    def sparsity(self) -> float:
        """The zero share of the layers' weights; 0 where there are no layers."""
        return self.zeros / max(self.weights, 1)

    @property
    def of_parameters(self) -> float:
        """The zeros' share of all parameters of the model."""
        return self.zeros / max(self.parameters, 1)

    def __str__(self) -> str:
        width = max((len(layer.name) for layer in self.layers), default=5)
        lines = [f"{'layer':<{width}} {'shape':>14} {'zeros':>12} {'sparsity':>9}"]
        for layer in self.layers:
            shape = " × ".join(map(str, layer.shape))
            lines.append(f"{layer.name:<{width}} {shape:>14} {layer.zeros:>12,} {layer.sparsity:>9.2%}")
        lines.append(f"{'all':<{width}} {'':>14} {self.zeros:>12,} {self.sparsity:>9.2%}")
        lines.append(f"{self.of_parameters:.2%} of all {self.parameters:,} parameters; zeros are stored as zeros")
        lines += [f"left alone: {name}: {reason}" for name, reason in self.skipped.items()]
        return "\n".join(lines)


def sparsity(model: nn.Module, *, kinds: tuple[str, ...] = ("linear",)) -> PruningReport:
    """Count the zeros of all layers of these `kinds` (see `prune`), whether or not a mask holds them."""
    layers, skipped = prunable(model, kinds)
    return report_of(model, layers, skipped)


def report_of(model: nn.Module, layers: dict[str, nn.Module], skipped: dict[str, str]) -> PruningReport:
    """The report of these layers of `model`."""
    counted = []
    for name, module in layers.items():
        weight = module.get_parameter("weight")
        counted.append(LayerSparsity(name, tuple(weight.shape), int((weight == 0).sum())))
    return PruningReport(tuple(counted), sum(p.numel() for p in model.parameters()), skipped)
