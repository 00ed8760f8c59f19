"""The nodes that read rows of an embedding's table, for each kind of table that there is.

A quantized table stays as it lies, and the rows that are asked for are restored: with `GatherBlockQuantized` of ONNX
Runtime in affine 4 bits, with standard operators in 8 bits, NF4 and FP4. Where a head is tied to the table, both read
the same bytes.

Letters: B batch, T length, V vocabulary, D width.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from torch import nn

from neural_layers.errors import InputError
from neural_layers.kernels.four_bit import CODES
from neural_layers.models.export.graph import CONTRIB, Graph
from neural_layers.models.export.products import array, codes, store_4bit, store_int4
from neural_layers.quantized_embedding import Embedding4bit, EmbeddingInt4, EmbeddingInt8
from neural_layers.wrappers.quantization.half import EmbeddingHalf

_FLOAT, _INT64 = 1, 7


def embed_rows(g: Graph, ids: str, name: str, table: Any) -> str:
    """Rows of the table of an `nn.Embedding` or a quantized one: ids (B, T) → (B, T, D) float32.

    Raises InputError for any other module.
    """
    if isinstance(table, nn.Embedding) and type(table).forward is nn.Embedding.forward:
        return g.op("Gather", g.weight(name, array(table.weight)), ids)
    if type(table) not in QUANTIZED:
        known = ", ".join(kind.__name__ for kind in (nn.Embedding, *QUANTIZED))
        raise InputError(
            f"{type(table).__name__} ({name.removesuffix('.weight')}) cannot be exported; exported are {known}. Merge "
            "adapters with fold_lora"
        )
    return QUANTIZED[type(table)](g, ids, name, table)


def _int8(g: Graph, ids: str, name: str, table: EmbeddingInt8) -> str:
    rows = g.op("Cast", g.op("Gather", g.weight(name, codes(table.weight)), ids), to=_FLOAT)
    scale = g.op("Gather", g.weight(f"{name}.scale", array(table.scale)), ids)
    return g.op("Mul", rows, g.op("Unsqueeze", scale, [-1]))


def _half(g: Graph, ids: str, name: str, table: EmbeddingHalf) -> str:
    return g.op("Cast", g.op("Gather", g.weight(name, codes(table.weight)), ids), to=_FLOAT)


def _int4(g: Graph, ids: str, name: str, table: EmbeddingInt4) -> str:
    packed, scale, zero = store_int4(g, name, [table])
    rows = g.op(
        "GatherBlockQuantized", g.op("Reshape", packed, [table.num_embeddings, -1]), ids, scale, zero,
        domain=CONTRIB, gather_axis=0, quantize_axis=1, block_size=table.block_size, bits=4,
    )  # fmt: skip
    if table.embedding_dim % table.block_size == 0:
        return rows
    return g.op("Slice", rows, [0], [table.embedding_dim], [2])  # the last block is filled up


def _4bit(g: Graph, ids: str, name: str, table: Embedding4bit) -> str:
    """The values of the codes times the absmax of their blocks; element j of row i is number i·D + j of the table."""
    packed, absmax, size = store_4bit(g, name, [table])
    start = g.op("Mul", g.op("Unsqueeze", ids, [-1]), table.embedding_dim)
    place = g.op("Add", start, np.arange(table.embedding_dim))
    byte = g.op("Gather", packed, g.op("Div", place, 2))
    high, low = (
        g.op("BitShift", byte, np.array(4, np.uint8), direction="RIGHT"),
        g.op("Mod", byte, np.array(16, np.uint8)),
    )
    code = g.op("Where", g.op("Equal", g.op("Mod", place, 2), 0), high, low)
    values = g.op("Gather", np.array(CODES[table.quant_type], np.float32), g.op("Cast", code, to=_INT64))
    return g.op("Mul", values, g.op("Gather", absmax, g.op("Div", place, size)))


QUANTIZED: dict[type, Callable[[Graph, str, str, Any], str]] = {
    EmbeddingHalf: _half,
    EmbeddingInt8: _int8,
    EmbeddingInt4: _int4,
    Embedding4bit: _4bit,
}
