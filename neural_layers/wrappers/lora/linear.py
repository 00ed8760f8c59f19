"""Adapters of a linear layer.

Letters: R rank.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neural_layers.wrappers.lora.adapter import Adapter
from neural_layers.wrappers.lora.layer import LoRALayer


class LoRALinear(LoRALayer):
    """A linear layer with adapters: (..., in) → (..., out), y = x Wᵀ + b + Σ weight · dropout(x) ΔWᵀ.

    base_layer: anything with `in_features`, `out_features` and `bias`: `nn.Linear`, or a quantized one (QLoRA,
    arXiv 2305.14314), whose bits stay as they are. A (R, in) is drawn as `nn.Linear` draws its weight, B (out, R) is
    zero. With an adapter for each row the rows are the first dimension of x.
    """

    @property
    def in_features(self) -> int:
        """Inputs of the base."""
        return int(self.base_layer.in_features)

    @property
    def out_features(self) -> int:
        """Outputs of the base."""
        return int(self.base_layer.out_features)

    @staticmethod
    def sizes(base: Any) -> tuple[int, int]:
        return base.in_features, base.out_features

    @staticmethod
    def begin(base: Any, r: int, like: Tensor) -> tuple[Tensor, Tensor]:
        a = like.new_empty(r, base.in_features)
        nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        return a, like.new_zeros(base.out_features, r)

    @staticmethod
    def norm(weight: Tensor) -> Tensor:
        return torch.linalg.vector_norm(weight, dim=1)

    @staticmethod
    def spread(factor: Tensor) -> Tensor:
        return factor.unsqueeze(1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.base_layer(x)
        selection = self.selected()
        if selection.is_disabled:
            return out
        if selection.rows is None:
            base = out
            for adapter, factor in self.chosen(selection.weights):
                out = self._add(adapter, factor, x, base, out)
            return out
        for adapter, index in self.own_rows(x, selection):
            own, base = x.index_select(0, index), out.index_select(0, index)
            out = out.index_copy(0, index, self._add(adapter, 1.0, own, base, base))
        return out

    def _add(self, adapter: Adapter, factor: float, x: Tensor, base: Tensor, out: Tensor) -> Tensor:
        """out + factor · ΔW·x, where `base` is W·x + b."""
        seen = self.dropped(adapter, x).to(adapter.lora_A.dtype)
        hidden = F.linear(seen, adapter.lora_A)
        scale = adapter.settings.scale
        if adapter.magnitude is not None:
            low = F.linear(hidden, adapter.lora_B) * scale
            return out + (factor * self._dora(adapter, x, seen, base, low)).to(out.dtype)
        if out.dtype != hidden.dtype:
            return out + (F.linear(hidden, adapter.lora_B) * (factor * scale)).to(out.dtype)
        # One call instead of a product, a scaling and a sum, each of which would write an output of its own.
        flat, low = out.reshape(-1, out.shape[-1]), hidden.reshape(-1, adapter.settings.r)
        return torch.addmm(flat, low, adapter.lora_B.t(), alpha=factor * scale).view(out.shape)

    def _dora(self, adapter: Adapter, x: Tensor, seen: Tensor, base: Tensor, low: Tensor) -> Tensor:
        """(m/‖W + ΔW‖ − 1) · W·x + m/‖W + ΔW‖ · s·B·A·x."""
        with torch.no_grad():
            weight = self.base_weight().to(adapter.lora_A.dtype)
            delta = adapter.product()
        factor = self.dora_factor(adapter, weight, delta)
        if adapter.settings.dropout and self.training:
            base = self.base_layer(seen.to(x.dtype))
        plain = (base if self.bias is None else base - self.bias).to(low.dtype)
        return (factor - 1) * plain + factor * low
