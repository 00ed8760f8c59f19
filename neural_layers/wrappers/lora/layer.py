"""What the wrappers of linear layers, embeddings and convolutions share: adapters by name and the weight they make."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from neural_layers.errors import InputError
from neural_layers.linear import dense_weight
from neural_layers.wrappers.lora.adapter import Adapter, Selection, Settings

Chosen = Sequence[tuple[Adapter, float]]


@dataclass
class Merge:
    """What a merged layer keeps to be taken apart again: the base as it was (None where nobody asked for it), the
    adapters that are in the weight, and whether the weight was a tied one."""

    original: nn.Module | None
    weights: tuple[tuple[str, float], ...]
    was_tied: bool = False


class LoRALayer(nn.Module):
    """A layer with named low-rank adapters. `base_layer` is the layer itself, which stays as it is.

    The weight in use is W + Σ weight · ΔW over the adapters in use, where ΔW = s·B·A, or with DoRA
    m · (W + s·B·A) / ‖W + s·B·A‖ − W. `adapters` holds the tensors; `selection` says which are in use.
    """

    base_layer: Any
    adapters: nn.ModuleDict

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self.adapters = nn.ModuleDict()
        self.selection = Selection()
        self.merged: Merge | None = None
        self._seen: Selection | None = None
        self.train(base_layer.training)

    # What a kind of layer defines.

    @staticmethod
    def sizes(base: Any) -> tuple[int, int]:
        """(inputs, outputs) of the low-rank product that changes the weight of `base`."""
        raise NotImplementedError

    @staticmethod
    def begin(base: Any, r: int, like: Tensor) -> tuple[Tensor, Tensor]:
        """A and B of a new adapter of rank r, with B·A = 0, in the dtype and on the device of `like`."""
        raise NotImplementedError

    @staticmethod
    def as_weight(product: Tensor, shape: torch.Size) -> Tensor:
        """The product (outputs, inputs) in the layout of the weight."""
        return product.view(shape)

    @staticmethod
    def norm(weight: Tensor) -> Tensor:
        """The norm of each output's weight, in the shape of DoRA's magnitude."""
        raise NotImplementedError

    @staticmethod
    def spread(factor: Tensor) -> Tensor:
        """A factor of each output, in the shape of the magnitude, such that it multiplies the weight."""
        raise NotImplementedError

    # Adapters.

    def new_adapter(self, settings: Settings) -> Adapter:
        """An adapter that changes nothing yet. Raises InputError for a rank above the layer's."""
        inputs, outputs = self.sizes(self.base_layer)
        if settings.r > min(inputs, outputs):
            raise InputError(
                f"r={settings.r} is above the rank {min(inputs, outputs)} of a weight of {inputs} inputs and {outputs} "
                f"outputs; give it a lower one by rank_pattern"
            )
        stored: Tensor = self.base_layer.weight
        # Half precision would lose the small steps of training; a quantized weight stands for float32.
        like = stored.new_empty(0, dtype=torch.promote_types(stored.dtype, torch.float32))
        a, b = self.begin(self.base_layer, settings.r, like)
        magnitude = self.norm(self.base_weight().detach().to(like.dtype)) if settings.use_dora else None
        return Adapter(settings, a, b, magnitude)

    def base_weight(self) -> Tensor:
        """W, in full where the base is quantized."""
        return dense_weight(self.base_layer)

    def chosen(self, names: Sequence[tuple[str, float]]) -> list[tuple[Adapter, float]]:
        """The adapters of these names that this layer has, with their weights.

        Raises InputError for one that lies on another device than the base.
        """
        found: list[tuple[Any, float]] = [(self.adapters[n], w) for n, w in names if n in self.adapters]
        # A stand-in for the base, as an export compares with, may have no weight.
        weight = getattr(self.base_layer, "weight", None)
        for adapter, _ in found:
            own, base = adapter.lora_A.device, adapter.lora_A.device if weight is None else weight.device
            if own != base:
                raise InputError(f"an adapter lies on {own} and its base on {base}; move both: model.to({str(base)!r})")
        return found

    # The weight.

    def change(self, adapter: Adapter, weight: Tensor) -> Tensor:
        """ΔW of one adapter on the weight W, in the dtype of W."""
        delta = self.as_weight(adapter.product(weight.dtype), weight.shape)
        if adapter.magnitude is None:
            return delta
        return self.spread(self.dora_factor(adapter, weight, delta)) * (weight + delta) - weight

    def dora_factor(self, adapter: Adapter, weight: Tensor, delta: Tensor) -> Tensor:
        """m / ‖W + ΔW‖ with the norm held constant; a row of zeros keeps its zeros."""
        assert adapter.magnitude is not None
        norm = self.norm((weight + delta).detach())
        return adapter.magnitude.to(norm.dtype) / norm.clamp_min(torch.finfo(norm.dtype).tiny)

    def changed(self, chosen: Chosen, dtype: torch.dtype | None = None) -> Tensor:
        """W + Σ weight · ΔW, computed in `dtype` (by default that of W, at least float32)."""
        weight = self.base_weight()
        weight = weight.to(torch.promote_types(weight.dtype, torch.float32) if dtype is None else dtype)
        out = weight
        for adapter, factor in chosen:
            out = out + factor * self.change(adapter, weight)
        return out

    def dense_weight(self) -> Tensor:
        """The weight in use, with its gradient, as a loss takes it that does not call the layer.

        Raises InputError where it would not be the layer's: with an adapter for each row of the batch, or while
        dropout acts on the inputs of an adapter in use.
        """
        chosen = self._in_use()
        if self.training and any(adapter.settings.dropout for adapter, _ in chosen):
            raise InputError(
                "the weight of this layer is read as one matrix, without the inputs that the dropout of its adapter "
                "would act on; set dropout=0 for an adapter of it, or leave it out of target_modules"
            )
        return self._weight(chosen)

    @property
    def weight(self) -> Tensor:
        """The weight in use, in the dtype of the base's, without dropout; raises InputError with rows of adapters."""
        return self._weight(self._in_use())

    def _weight(self, chosen: Chosen) -> Tensor:
        weight = self.base_weight()
        return self.changed(chosen).to(weight.dtype) if chosen else weight

    @property
    def bias(self) -> Tensor | None:
        """That of the base layer."""
        bias: Tensor | None = self.base_layer.bias
        return bias

    # What is in use.

    def selected(self) -> Selection:
        """What is in use in this call of `forward`.

        Raises RuntimeError where gradient checkpointing calls again, in the backward pass, what was called with other
        adapters in use: the gradients would be those of another model.
        """
        now = Selection(is_disabled=True) if self.merged is not None else self.selection
        if torch.compiler.is_compiling():
            return now
        if torch._C._current_graph_task_id() == -1:
            self._seen = now
        elif self._seen is not None and self._seen != now:
            raise RuntimeError(
                "the adapters in use changed between the forward pass and the backward pass that computes it again; "
                "call backward() inside the block (adapter_rows, disable_adapters), and set_adapter after it"
            )
        return now

    def _in_use(self) -> list[tuple[Adapter, float]]:
        selection = self.selected()
        if selection.is_disabled:
            return []
        if selection.rows is not None and any(name in self.adapters for name in selection.rows if name):
            raise InputError(
                "with an adapter for each row of the batch a layer has no one weight, and this one's is read without "
                "calling the layer; leave it out of target_modules, or compute the loss from the logits"
            )
        return self.chosen(selection.weights)

    def own_rows(self, x: Tensor, selection: Selection) -> Iterator[tuple[Adapter, Tensor]]:
        """Each adapter in use that this layer has, and the indices of its rows. Raises InputError for another batch."""
        for name, index in self.row_groups(x, selection):
            for adapter, _ in self.chosen([] if name is None else [(name, 1.0)]):
                yield adapter, index

    def row_groups(self, x: Tensor, selection: Selection) -> Iterator[tuple[str | None, Tensor]]:
        """The name of each adapter in use and the indices of its rows. Raises InputError for another batch."""
        assert selection.rows is not None
        if x.shape[0] != len(selection.rows):
            raise InputError(
                f"adapter_rows names {len(selection.rows)} rows, and a layer's input has {x.shape[0]}; give one name "
                "for each row of the batch (each beam is a row)"
            )
        for name, rows in selection.groups().items():
            yield name, torch.tensor(rows, device=x.device)

    def dropped(self, adapter: Adapter, x: Tensor) -> Tensor:
        """The inputs that the adapter sees."""
        rate = adapter.settings.dropout
        return nn.functional.dropout(x, rate) if rate and self.training else x

    def extra_repr(self) -> str:
        return f"selection={self.selection}, merged={self.merged is not None}"
