"""The layers of a model with a weight, written into a graph as they are: float32, quantized, or some of each.

Letters: B batch, T length, K inputs, N outputs, V vocabulary, D width.
"""

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import numpy as np
from torch import nn

from neural_layers.models.export.adapters import base_of, with_adapters
from neural_layers.models.export.blocks import BITS, FEWEST, Blocks
from neural_layers.models.export.graph import Graph
from neural_layers.models.export.integer import HEAD, SCHEMES
from neural_layers.models.export.products import FLOAT, Product, array, is_plain, product_of
from neural_layers.models.export.tables import embed_rows
from neural_layers.quantized_embedding import EmbeddingInt8

__all__ = ["Weights", "array"]


class Weights:
    """Writes the linear layers and embeddings of a model.

    model: whose names the stored weights get. quantize: None; "int8" or "int4" for blocks; or one of `integer.SCHEMES`
    for what `integer.quantize_graph` takes: embeddings in 8 bits, linear layers in float32.
    """

    def __init__(self, model: nn.Module, quantize: str | None) -> None:
        self._blocks = Blocks(BITS[quantize]) if quantize in BITS else None
        self._is_integer = quantize in SCHEMES
        self._names = {id(module): name.removesuffix(".base_layer") for name, module in model.named_modules()}

    def name(self, module: nn.Module) -> str:
        """The module's name in the model."""
        return self._names[id(module)]

    def linear(self, g: Graph, x: str, layer: Any) -> str:
        """x (…, K) through a linear layer: (…, N).

        Raises InputError for a layer that is something else.
        """
        return self.linears(g, x, layer)[0]

    def linears(self, g: Graph, x: str, *layers: Any) -> list[str]:
        """x (…, K) through each of several linear layers. Neighbours of a kind share one product, which is faster than
        several."""
        outputs = []
        for _, group in groupby(map(base_of, layers), lambda layer: self._product(layer).key(layer)):
            side = list(group)
            y = self._product(side[0]).multiply(g, x, self._stored(side) + ".weight", side, False)
            y = self._biased(g, y, side)
            outputs += [y] if len(side) == 1 else self.split(g, y, [layer.out_features for layer in side])
        return [with_adapters(g, x, y, layer, self.name(layer)) for y, layer in zip(outputs, layers, strict=True)]

    def split(self, g: Graph, y: str, sizes: Sequence[int]) -> list[str]:
        """Parts of the last dimension."""
        return g.ops("Split", y, list(sizes), count=len(sizes), axis=-1)

    def embed(self, g: Graph, ids: str, embedding: Any) -> str:
        """Rows of the table: (B, T) → (B, T, D). Raises InputError for what is no embedding."""
        name = self.name(embedding) + ".weight"
        if self._blocks is not None and isinstance(embedding, nn.Embedding):
            rows = self._blocks.embed(g, ids, name, array(embedding.weight))
            if rows is not None:
                return rows
        if self._is_integer and embedding.embedding_dim >= FEWEST:
            embedding = EmbeddingInt8.from_embedding(embedding)
        return embed_rows(g, ids, name, embedding)

    def head(self, g: Graph, x: str, head: Any, embedding: Any) -> str:
        """Logits (B, T, V). Where the head is tied to the embedding, the weight is stored once."""
        base = base_of(head)
        product = self._product(base)
        if base.weight is not embedding.weight:
            return self.linear(g, x, head)
        if self._is_integer:  # its codes are found to be those of the table's rows, and stored once, when there are any
            y = FLOAT.multiply(g, x, self.name(embedding) + ".weight" + HEAD, [base], False)
        else:
            y = product.multiply(g, x, self.name(embedding) + ".weight", [base], True)
        return with_adapters(g, x, self._biased(g, y, [base]), head, self.name(head))

    def _product(self, layer: Any) -> Product:
        if self._blocks is not None and is_plain(layer):
            return self._blocks.product
        return product_of(layer, self._names.get(id(layer), "?"))

    def _stored(self, layers: Sequence[Any]) -> str:
        return "+".join(self.name(layer) for layer in layers)

    def _biased(self, g: Graph, y: str, layers: Sequence[Any]) -> str:
        if all(layer.bias is None for layer in layers):
            return y
        biases = [
            np.zeros(layer.out_features, np.float32) if layer.bias is None else array(layer.bias) for layer in layers
        ]
        return g.op("Add", y, g.weight(self._stored(layers) + ".bias", np.concatenate(biases)))
