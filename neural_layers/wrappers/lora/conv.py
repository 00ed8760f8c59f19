"""Adapters of a convolution over one dimension.

Letters: B batch, T length, E channels, W taps, R rank.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neural_layers.kernels.causal_conv1d import causal_conv1d
from neural_layers.recurrence import CausalConv1d
from neural_layers.wrappers.lora.adapter import Adapter, Selection
from neural_layers.wrappers.lora.layer import Chosen, LoRALayer


class LoRAConv1d(LoRALayer):
    """A Conv1d with adapters: the convolution by W + Σ weight · ΔW, where ΔW (out, in/groups, W) is s·B·A in the shape
    of W.

    base_layer: `nn.Conv1d` of any stride, padding and groups, or the `CausalConv1d` of a mixer, which is called as the
    mixer calls it. A (R, in/groups, W), B (out, R, 1): for groups=1 PEFT's. PEFT's layers for several groups are not a
    change of the weight; here a depthwise filter's rank is at most its W taps.
    """

    @property
    def kernel_size(self) -> tuple[int, ...]:
        """Of the base."""
        size: tuple[int, ...] = self.base_layer.kernel_size
        return size

    @property
    def in_channels(self) -> int:
        """Channels that come in."""
        return int(self.base_layer.in_channels)

    @property
    def out_channels(self) -> int:
        """Channels that go out."""
        return int(self.base_layer.out_channels)

    @property
    def groups(self) -> int:
        """Groups of channels that see each other."""
        return int(self.base_layer.groups)

    @staticmethod
    def sizes(base: Any) -> tuple[int, int]:
        return base.in_channels // base.groups * base.kernel_size[0], base.out_channels

    @staticmethod
    def begin(base: Any, r: int, like: Tensor) -> tuple[Tensor, Tensor]:
        a = like.new_empty(r, base.in_channels // base.groups, base.kernel_size[0])
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        return a, like.new_zeros(base.out_channels, r, 1)

    @staticmethod
    def norm(weight: Tensor) -> Tensor:
        return torch.linalg.vector_norm(weight, dim=(1, 2)).view(1, -1, 1)

    @staticmethod
    def spread(factor: Tensor) -> Tensor:
        return factor.view(-1, 1, 1)

    def forward(self, x: Tensor, **how: Any) -> Tensor:
        """x (B, T, E) for a `CausalConv1d`, with its keywords; else (B, E, T) or (E, T), as `nn.Conv1d`."""
        selection = self.selected()
        if selection.is_disabled:
            return self._run(x, [], how)
        if selection.rows is None:
            return self._run(x, self.chosen(selection.weights), how)
        return self._by_rows(x, selection, how)

    def _by_rows(self, x: Tensor, selection: Selection, how: dict[str, Any]) -> Tensor:
        parts, order = [], []
        for name, index in self.row_groups(x, selection):
            own = {
                key: value.index_select(0, index) if isinstance(value, Tensor) else value for key, value in how.items()
            }
            chosen = self.chosen([] if name is None else [(name, 1.0)])
            parts.append(self._run(x.index_select(0, index), chosen, own))
            order.append(index)
        return torch.cat(parts).index_select(0, torch.cat(order).argsort())

    def _run(self, x: Tensor, chosen: Chosen, how: dict[str, Any]) -> Tensor:
        if not chosen:
            out: Tensor = self.base_layer(x, **how)
            return out
        if not (self.training and any(adapter.settings.dropout for adapter, _ in chosen)):
            weight = self.changed(chosen).to(self.base_layer.weight.dtype)
            return self._convolve(x, weight, self.bias, **how)
        activation = how.pop("activation", None)
        out = self._convolve(x, self.base_layer.weight, self.bias, **how)
        for adapter, factor in chosen:
            out = out + self._dropped_change(adapter, factor, x, how)
        return F.silu(out) if activation == "silu" else out

    def _dropped_change(self, adapter: Adapter, factor: float, x: Tensor, how: dict[str, Any]) -> Tensor:
        """factor · ΔW applied to inputs of which dropout has taken some, those in the state too."""
        own = dict(how)
        if own.get("initial_state") is not None:
            own["initial_state"] = self.dropped(adapter, own["initial_state"])
        weight = self.base_layer.weight
        change = factor * self.change(adapter, weight.to(torch.promote_types(weight.dtype, torch.float32)))
        return self._convolve(self.dropped(adapter, x), change.to(weight.dtype), None, **own)

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None, **how: Any) -> Tensor:
        base = self.base_layer
        if isinstance(base, CausalConv1d):
            made: Any = causal_conv1d(x, weight.squeeze(1), bias, **how)
            return made
        out: Tensor = base._conv_forward(x, weight, bias, **how)
        return out
