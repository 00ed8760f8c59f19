"""Linear layers and embeddings in a graph, in float32 or with 8- or 4-bit weights.

Quantized weights are `MatMulNBits` of ONNX Runtime at accuracy level 4: blocks of weights share a scale, and the
activations are rounded to 8 bits within each block of a row. Its 8-bit form is taken for int8 as well, and not
`DynamicQuantizeLinear` with `MatMulInteger`: that one has a single scale for all rows of a call, so that what a token
computes would depend on what else is in the batch and in the chunk. At one row both take the same time. A trained
hybrid (4 layers, 128 wide, characters) has a loss of 1.7367 in float32, 1.7363 in int8 and 1.7424 in int4.

Letters: K inputs, N outputs, V vocabulary, D width.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from neural_layers.errors import InputError
from neural_layers.models.export.graph import CONTRIB, Graph

BITS = {"int8": 8, "int4": 4}
_BLOCKS = (64, 32, 16)  # MatMulNBits takes powers of two from 16 on
# Of fewer inputs, a weight is too small for its rounding to be worth it: Δ's projection of a Mamba layer, for one.
_FEWEST = 64


def array(tensor: Tensor) -> np.ndarray:
    """A parameter as float32."""
    values: np.ndarray = tensor.detach().to("cpu", torch.float32).numpy()
    return values


def block_size(inputs: int) -> int | None:
    """How many weights of a row share a scale; None for a weight that stays float32.

    It follows from K alone, so that layers of one input are quantized alike, side by side or each for itself.
    """
    return next((size for size in _BLOCKS if inputs >= _FEWEST and inputs % size == 0), None)


def quantize_blocks(weight_NK: np.ndarray, bits: int, block: int) -> tuple[np.ndarray, np.ndarray]:
    """Codes (N, K) of `bits` bits and scales (N, K / block): weight ≈ scale · (code − 2^(bits − 1)).

    The scale takes the sign that maps a block's largest magnitude to −2^(bits − 1), which has one code more than the
    other side.
    """
    middle = 2 ** (bits - 1)
    parts = weight_NK.reshape(weight_NK.shape[0], -1, block)
    largest = np.take_along_axis(parts, np.abs(parts).argmax(-1, keepdims=True), -1)
    scale = (largest / -middle).astype(np.float32)
    codes = np.rint(parts / np.where(scale == 0, 1, scale)) + middle
    return codes.clip(0, 2 * middle - 1).astype(np.uint8).reshape(weight_NK.shape), scale[..., 0]


def rounded(weight: Tensor, quantize: str) -> Tensor:
    """A weight (N, K) as the graph's quantized form restores it; itself where it is not quantized."""
    outputs, inputs = weight.shape
    block, bits = block_size(inputs), BITS[quantize]
    if block is None:
        return weight
    codes, scale = quantize_blocks(array(weight), bits, block)
    parts = codes.reshape(outputs, -1, block).astype(np.float32) - 2 ** (bits - 1)
    return torch.from_numpy((parts * scale[..., None]).reshape(outputs, inputs)).to(weight)


class Weights:
    """Writes the linear layers of a model.

    model: whose names the stored weights get. quantize: None, "int8" or "int4".
    """

    def __init__(self, model: nn.Module, quantize: str | None) -> None:
        self.bits = None if quantize is None else BITS[quantize]
        self._names = {id(module): name for name, module in model.named_modules()}

    def name(self, module: nn.Module) -> str:
        """The module's name in the model."""
        return self._names[id(module)]

    def linear(self, g: Graph, x: str, *layers: Any) -> str:
        """x (…, K) through linear layers side by side: (…, N₁ + N₂ + …). One product is faster than several.

        Raises InputError for layers that are something else (an adapter, a quantized layer).
        """
        for layer in layers:
            if not isinstance(layer, nn.Linear):
                raise InputError(
                    f"{type(layer).__name__} ({self.name(layer)}) cannot be exported; merge adapters first, and export "
                    "the model that is not quantized with quantize='int8' or 'int4'"
                )
        weight = np.concatenate([array(layer.weight) for layer in layers])
        name = "+".join(self.name(layer) for layer in layers) + ".weight"
        block = block_size(weight.shape[1])
        if self.bits is not None and block is not None:
            y = self._matmul_bits(g, x, name, weight, block)
        else:
            y = g.op("MatMul", x, g.weight(name, weight.T))
        if all(layer.bias is None for layer in layers):
            return y
        biases = [
            np.zeros(layer.weight.shape[0], np.float32) if layer.bias is None else array(layer.bias) for layer in layers
        ]
        return g.op("Add", y, g.weight(name.removesuffix("weight") + "bias", np.concatenate(biases)))

    def split(self, g: Graph, y: str, sizes: Sequence[int]) -> list[str]:
        """Parts of the last dimension."""
        return g.ops("Split", y, list(sizes), count=len(sizes), axis=-1)

    def embed(self, g: Graph, ids: str, embedding: nn.Embedding) -> str:
        """Rows of the table: (B, T) → (B, T, D). Quantized, it is the same bytes that a tied head multiplies with."""
        table, name = array(embedding.weight), self.name(embedding) + ".weight"
        block = block_size(table.shape[1])
        if self.bits is None or block is None:
            return g.op("Gather", g.weight(name, table), ids)
        packed, scale = self._packed(g, name, table, block)
        rows = g.op("Reshape", packed, [table.shape[0], -1])
        return g.op(
            "GatherBlockQuantized", rows, ids, scale,
            domain=CONTRIB, gather_axis=0, quantize_axis=1, block_size=block, bits=self.bits,
        )  # fmt: skip

    def head(self, g: Graph, x: str, head: nn.Linear, embedding: nn.Embedding) -> str:
        """Logits (B, T, V). Where the head is tied to the embedding, the weight is stored once."""
        if head.weight is not embedding.weight or head.bias is not None:
            return self.linear(g, x, head)
        table, name = array(embedding.weight), self.name(embedding) + ".weight"
        block = block_size(table.shape[1])
        if self.bits is not None and block is not None:
            return self._matmul_bits(g, x, name, table, block)
        # Gemm takes the table as it lies; its rows are the tokens of the whole batch.
        flat = g.op("Reshape", x, [-1, table.shape[1]])
        logits = g.op("Gemm", flat, g.weight(name, table), transB=1)
        return g.op("Reshape", logits, g.concat(g.op("Shape", x, start=0, end=2), [table.shape[0]]))

    def _packed(self, g: Graph, name: str, weight_NK: np.ndarray, block: int) -> tuple[str, str]:
        bits = self.bits or 8
        if f"{name}.scale" not in g.root.initializers:
            codes, scale = quantize_blocks(weight_NK, bits, block)
            packed = codes if bits == 8 else codes[:, ::2] | codes[:, 1::2] << 4
            g.weight(name, packed.reshape(len(packed), -1, block * bits // 8))
            g.weight(f"{name}.scale", scale)
        return name, f"{name}.scale"

    def _matmul_bits(self, g: Graph, x: str, name: str, weight_NK: np.ndarray, block: int) -> str:
        packed, scale = self._packed(g, name, weight_NK, block)
        outputs, inputs = weight_NK.shape
        return g.op(
            "MatMulNBits", x, packed, scale,
            domain=CONTRIB, K=inputs, N=outputs, bits=self.bits, block_size=block, accuracy_level=4,
        )  # fmt: skip
