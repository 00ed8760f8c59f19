"""Adapters of an embedding.

Letters: V vocabulary, D width, R rank.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neural_layers.errors import InputError
from neural_layers.wrappers.lora.adapter import Adapter
from neural_layers.wrappers.lora.layer import LoRALayer


class LoRAEmbedding(LoRALayer):
    """An embedding with adapters: ids (...) → (..., D), the rows of W + Σ weight · ΔW, W being (V, D).

    base_layer: anything with `num_embeddings` and `embedding_dim`: `nn.Embedding`, or a quantized one. A (R, V) is
    zero, B (D, R) is drawn from N(0, 1). Dropout does not act here: ids have no inputs to drop. An embedding that
    multiplies by an `embed_scale` of its own does so with ΔW too. Raises InputError for a base with `max_norm`.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        if getattr(base_layer, "max_norm", None) is not None:
            raise InputError(
                "an embedding with max_norm rewrites its weight in forward, which an adapter cannot follow; set "
                "max_norm=None, or leave it out of target_modules"
            )
        super().__init__(base_layer)

    @property
    def num_embeddings(self) -> int:
        """V."""
        return int(self.base_layer.num_embeddings)

    @property
    def embedding_dim(self) -> int:
        """D."""
        return int(self.base_layer.embedding_dim)

    @property
    def padding_idx(self) -> int | None:
        """The id whose row gets no gradient."""
        index: int | None = getattr(self.base_layer, "padding_idx", None)
        return index

    @staticmethod
    def sizes(base: Any) -> tuple[int, int]:
        return base.num_embeddings, base.embedding_dim

    @staticmethod
    def begin(base: Any, r: int, like: Tensor) -> tuple[Tensor, Tensor]:
        return like.new_zeros(r, base.num_embeddings), torch.randn_like(like.new_empty(base.embedding_dim, r))

    @staticmethod
    def as_weight(product: Tensor, shape: torch.Size) -> Tensor:
        return product.t()

    @staticmethod
    def norm(weight: Tensor) -> Tensor:
        return torch.linalg.vector_norm(weight, dim=0)

    @staticmethod
    def spread(factor: Tensor) -> Tensor:
        return factor

    @property
    def bias(self) -> None:
        """An embedding has none."""

    def dropped(self, adapter: Adapter, x: Tensor) -> Tensor:
        return x

    def forward(self, ids: Tensor) -> Tensor:
        out: Tensor = self.base_layer(ids)
        selection = self.selected()
        if selection.is_disabled:
            return out
        if selection.rows is None:
            base = out
            for adapter, factor in self.chosen(selection.weights):
                out = out + (factor * self._change(adapter, ids, base)).to(out.dtype)
            return out
        for adapter, index in self.own_rows(ids, selection):
            change = self._change(adapter, ids.index_select(0, index), out.index_select(0, index))
            out = out.index_add(0, index, change.to(out.dtype))
        return out

    def _change(self, adapter: Adapter, ids: Tensor, base: Tensor) -> Tensor:
        """The rows of ΔW, where `base` are those of W."""
        low = F.embedding(ids, adapter.lora_A.t(), self.padding_idx) @ adapter.lora_B.t() * adapter.settings.scale
        scale = getattr(self.base_layer, "embed_scale", None)
        if scale is not None:
            low = low * scale
        if adapter.magnitude is None:
            return low
        with torch.no_grad():
            weight = self.base_weight().to(low.dtype)
            delta = adapter.product().t()
        factor = self.dora_factor(adapter, weight, delta)
        return (factor - 1) * base.to(low.dtype) + factor * low
