"""Embeddings whose table stays in 8 or 4 bits: a lookup restores the rows that are asked for, and no others."""

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neural_layers.four_bit_weight import FourBitWeight
from neural_layers.frozen_bits import FrozenBits, check_finite
from neural_layers.kernels.dequantize_4bit.pytorch import rows_in, weight_in
from neural_layers.kernels.dequantize_int4.pytorch import values_of
from neural_layers.kernels.int4 import QuantizedInt4, check_quantized
from neural_layers.kernels.int8 import dequantize_rows, quantize_rows
from neural_layers.kernels.quantize_4bit import quantize_4bit
from neural_layers.kernels.quantize_int4 import quantize_int4

Table = TypeVar("Table", bound="_Embedding")


class _Embedding(FrozenBits):
    """What the quantized embeddings share: ids of any shape → (..., embedding_dim) in `dtype`.

    The table is frozen, its bits are buffers that no `.to(dtype)` changes; `.to(dtype)`, `.half()` and the like change
    the dtype of what a lookup returns, as they would for nn.Embedding.
    """

    def _set_sizes(self, num_embeddings: int, embedding_dim: int, padding_idx: int | None, dtype: torch.dtype) -> None:
        self.num_embeddings, self.embedding_dim, self.padding_idx = num_embeddings, embedding_dim, padding_idx
        self.dtype = dtype

    @property
    def shape(self) -> tuple[int, int]:
        """(num_embeddings, embedding_dim)."""
        return self.num_embeddings, self.embedding_dim

    def _apply(self: Table, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Table:
        super()._apply(fn, recurse)
        self.dtype = fn(torch.empty(0, dtype=self.dtype, device=self.weight.device)).dtype
        return self

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}"


def _checked(embedding: nn.Embedding) -> nn.Embedding:
    if not isinstance(embedding, nn.Embedding):
        raise TypeError(f"embedding is a {type(embedding).__name__}; expected an nn.Embedding")
    if embedding.max_norm is not None:
        raise ValueError(f"max_norm={embedding.max_norm} changes the table in every call, which a frozen one cannot")
    return embedding


class EmbeddingInt8(_Embedding):
    """Rows of a table in 8 bits, a scale for each row: ids (...) → scale_id · weight_id, (..., embedding_dim).

    weight: int8 (num_embeddings, embedding_dim); scale: float32 (num_embeddings,). `LinearInt8.share` ties a head to
    it.
    device, dtype: where the table is drawn, as `nn.Embedding` draws it, and the dtype of what a lookup returns
    """

    bits = ("weight", "scale")
    weight: Tensor
    scale: Tensor

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        plain = nn.Embedding(num_embeddings, embedding_dim, padding_idx, device=device, dtype=dtype)
        self._set_sizes(num_embeddings, embedding_dim, plain.padding_idx, plain.weight.dtype)
        weight, scale = quantize_rows(plain.weight)
        self.register_buffer("weight", weight)
        self.register_buffer("scale", scale)

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding) -> "EmbeddingInt8":
        """The table of `embedding` in 8 bits, on the same device.

        Raises TypeError for what is no nn.Embedding, ValueError for one with max_norm or with NaN or infinity.
        """
        plain = _checked(embedding).weight
        layer = cls(plain.shape[0], plain.shape[1], embedding.padding_idx, device="meta", dtype=plain.dtype)
        layer.weight, layer.scale = quantize_rows(plain)
        check_finite(layer.scale)
        return layer.train(embedding.training)

    def dense_weight(self) -> Tensor:
        """The table in float32."""
        return dequantize_rows(self.weight, self.scale)

    def forward(self, ids: Tensor) -> Tensor:
        rows, scale = F.embedding(ids, self.weight), self.scale[ids]
        return dequantize_rows(rows, scale).to(self.dtype)


class EmbeddingInt4(_Embedding):
    """Rows of a table in 4 bits, affine in groups: ids (...) → scale · (code − zero_point), (..., embedding_dim).

    weight, scale, zero_point, block_size: as those of `LinearInt4`, whose `share` ties a head to it.
    device, dtype: where the table is drawn, as `nn.Embedding` draws it, and the dtype of what a lookup returns
    """

    bits = ("weight", "scale", "zero_point")
    weight: Tensor
    scale: Tensor
    zero_point: Tensor

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        block_size: int = 64,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        plain = nn.Embedding(num_embeddings, embedding_dim, padding_idx, device=device, dtype=dtype)
        self._set_sizes(num_embeddings, embedding_dim, plain.padding_idx, plain.weight.dtype)
        for name in self.bits:
            self.register_buffer(name, None)
        self.quantized = quantize_int4(plain.weight, block_size)

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding, block_size: int = 64) -> "EmbeddingInt4":
        """The table of `embedding` in 4 bits, on the same device.

        Raises TypeError for what is no nn.Embedding, ValueError for one with max_norm or with NaN or infinity.
        """
        plain = _checked(embedding).weight
        rows, width = plain.shape
        layer = cls(rows, width, embedding.padding_idx, block_size, device="meta", dtype=plain.dtype)
        layer.quantized = quantize_int4(plain, block_size)
        check_finite(layer.scale)
        return layer.train(embedding.training)

    @property
    def quantized(self) -> QuantizedInt4:
        """The table as the int4 ops take it; assigning another of that shape replaces it."""
        constants = (self.block_size, self.shape, torch.float32)
        return QuantizedInt4(self.weight, self.scale, self.zero_point, *constants)

    @quantized.setter
    def quantized(self, record: QuantizedInt4) -> None:
        check_quantized(record)
        if record.shape != self.shape:
            raise ValueError(f"the quantized table has shape {record.shape}; expected {self.shape}")
        self.weight, self.scale, self.zero_point = record.packed, record.scale, record.zero_point
        self.block_size = record.block_size

    def dense_weight(self) -> Tensor:
        """The table in float32."""
        q = self.quantized
        return values_of(q.packed, q.scale, q.zero_point, q.block_size, torch.float32)[:, : self.embedding_dim]

    def forward(self, ids: Tensor) -> Tensor:
        flat = ids.reshape(-1)
        bits = (F.embedding(flat, self.weight), self.scale[flat], self.zero_point[flat])
        rows = values_of(*bits, self.block_size, torch.float32)[:, : self.embedding_dim]
        return rows.to(self.dtype).reshape(*ids.shape, self.embedding_dim)


class Embedding4bit(_Embedding, FourBitWeight):
    """Rows of a table in NF4 or FP4 (arXiv 2305.14314): ids (...) → (..., embedding_dim).

    quant_type, block_size, double_quant: of `quantize_4bit`. The state dict has the keys of `Linear4bit`, whose `share`
    ties a head to it.
    device, dtype: where the table is drawn, as `nn.Embedding` draws it, and the dtype of what a lookup returns
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        padding_idx: int | None = None,
        quant_type: str = "nf4",
        block_size: int = 64,
        double_quant: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        plain = nn.Embedding(num_embeddings, embedding_dim, padding_idx, device=device, dtype=dtype)
        self._set_sizes(num_embeddings, embedding_dim, plain.padding_idx, plain.weight.dtype)
        self._register_bits()
        self.quantized = quantize_4bit(plain.weight, quant_type, block_size, double_quant)

    @classmethod
    def from_embedding(
        cls, embedding: nn.Embedding, quant_type: str = "nf4", block_size: int = 64, double_quant: bool = False
    ) -> "Embedding4bit":
        """The table of `embedding` in 4 bits, on the same device.

        Raises TypeError for what is no nn.Embedding, ValueError for one with max_norm.
        """
        plain = _checked(embedding).weight
        layer = cls(plain.shape[0], plain.shape[1], embedding.padding_idx, device="meta", dtype=plain.dtype)
        layer.quantized = quantize_4bit(plain, quant_type, block_size, double_quant)
        return layer.train(embedding.training)

    def dense_weight(self) -> Tensor:
        """The table in float32."""
        return weight_in(self.quantized, torch.float32)

    def forward(self, ids: Tensor) -> Tensor:
        if ids.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"ids have dtype {ids.dtype}; expected torch.int64 or torch.int32, as nn.Embedding does")
        rows = rows_in(self.quantized, ids.reshape(-1), torch.float32)
        return rows.to(self.dtype).reshape(*ids.shape, self.embedding_dim)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self._format()}"
