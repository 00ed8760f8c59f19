"""Layers whose weight is kept, and multiplied, in 16 bits, in a model of any dtype."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neural_layers.frozen_bits import FrozenBits

DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16}


def _checked(dtype: torch.dtype) -> torch.dtype:
    if dtype not in DTYPES.values():
        raise ValueError(f"dtype={dtype} must be torch.float16 or torch.bfloat16")
    return dtype


def _rounded(weight: Tensor, dtype: torch.dtype) -> Tensor:
    rounded = weight.detach().to(_checked(dtype), copy=True)
    if not rounded.is_meta and not bool(rounded.isfinite().all()):
        largest, most = float(weight.detach().abs().max()), torch.finfo(dtype).max
        raise ValueError(f"the weight reaches {largest:.4g}, and {dtype} ends at {most:.4g}; take bfloat16")
    return rounded


class EmbeddingHalf(FrozenBits):
    """A table in 16 bits: ids (...) → (..., embedding_dim) in `dtype`, which `.to(dtype)` changes; the table not.

    weight: float16 or bfloat16 (num_embeddings, embedding_dim), frozen; `LinearHalf.share` ties a head to it.
    """

    bits = ("weight",)

    def __init__(self, weight: Tensor, padding_idx: int | None, dtype: torch.dtype) -> None:
        super().__init__()
        _checked(weight.dtype)
        self.num_embeddings, self.embedding_dim = weight.shape
        self.padding_idx, self.dtype = padding_idx, dtype
        self.register_buffer("weight", weight)

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, dtype: torch.dtype) -> "EmbeddingHalf":
        """The table of `embedding`, rounded to `dtype`; lookups in the dtype that it has.

        Raises ValueError for a weight beyond the range of `dtype`.
        """
        plain = embedding.weight
        return cls(_rounded(plain, dtype), embedding.padding_idx, plain.dtype).train(embedding.training)

    @property
    def shape(self) -> tuple[int, int]:
        """(num_embeddings, embedding_dim)."""
        return self.num_embeddings, self.embedding_dim

    def dense_weight(self) -> Tensor:
        """The table in float32."""
        return self.weight.float()

    def forward(self, ids: Tensor) -> Tensor:
        return F.embedding(ids, self.weight).to(self.dtype)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "EmbeddingHalf":
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.weight.device)).dtype
        return self

    def extra_repr(self) -> str:
        return f"{self.num_embeddings}, {self.embedding_dim}, {self.weight.dtype}"


class LinearHalf(FrozenBits):
    """y = round16(x) Wᵀ + b with W in 16 bits: (..., in) → (..., out) in the dtype of x.

    weight: float16 or bfloat16 (out, in), which no `.to(dtype)` changes; frozen. The product is that of torch in this
    dtype (it sums in float32 and rounds the result); the bias is added in the dtype of x. The gradient flows to x and
    to the bias.
    """

    bits = ("weight",)

    def __init__(self, weight: Tensor, bias: nn.Parameter | None = None) -> None:
        super().__init__()
        _checked(weight.dtype)
        self.out_features, self.in_features = weight.shape
        self.register_buffer("weight", weight)
        self.bias = bias

    @classmethod
    def from_linear(cls, linear: nn.Linear, dtype: torch.dtype) -> "LinearHalf":
        """The weight of `linear`, rounded to `dtype`, and a copy of its bias.

        Raises ValueError for a weight beyond the range of `dtype`.
        """
        bias = linear.bias
        if bias is not None:
            bias = nn.Parameter(bias.detach().clone(), requires_grad=bias.requires_grad)
        return cls(_rounded(linear.weight, dtype), bias).train(linear.training)

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return self.out_features, self.in_features

    def share(self, embedding: EmbeddingHalf) -> "LinearHalf":
        """Make the weight the very tensor of the embedding, as a head tied to it does; returns the layer."""
        self._share(embedding, EmbeddingHalf)
        return self

    def dense_weight(self) -> Tensor:
        """W in float32."""
        return self.weight.float()

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            y = F.linear(x.to(self.weight.dtype), self.weight).to(x.dtype)
        return y if self.bias is None else y + self.bias.to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, bias={self.bias is not None}, {self.weight.dtype}"
