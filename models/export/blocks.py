"""Weights of a float model as 8- or 4-bit blocks: `quantize="int8"` and `"int4"` of the export.

They are `MatMulNBits` of ONNX Runtime at accuracy level 4: blocks of weights share a scale, and the activations are
rounded to 8 bits within each block of a row. Its 8-bit form is taken for int8 as well. At one row it takes the time of
`DynamicQuantizeLinear` with `MatMulInteger`, and what a token computes does not depend on the rest of the batch. A
trained hybrid (4 layers, 128 wide, characters) has a loss of 1.7367 in float32, 1.7363 in int8 and 1.7424 in int4.

Letters: K inputs, N outputs.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from neural_layers.models.export.graph import CONTRIB, Graph
from neural_layers.models.export.products import FLOAT, Product, array

BITS = {"int8": 8, "int4": 4}
_SIZES = (64, 32, 16)  # MatMulNBits takes powers of two from 16 on
# Of fewer inputs, a weight is too small for its rounding to be worth it: Δ's projection of a Mamba layer, for one.
FEWEST = 64


def block_size(inputs: int) -> int | None:
    """How many weights of a row share a scale; None for a weight that stays float32.

    It follows from K alone, so that layers of one input are quantized alike, side by side or each for itself.
    """
    return next((size for size in _SIZES if inputs >= FEWEST and inputs % size == 0), None)


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


class Blocks:
    """Products and rows of weights in blocks of `bits` bits; of too few inputs, float32."""

    def __init__(self, bits: int) -> None:
        self.bits = bits
        self.product = Product(lambda layer: "blocks", self._multiply)

    def embed(self, g: Graph, ids: str, name: str, table_VD: np.ndarray) -> str | None:
        """Rows of a table, of the very bytes that a tied head multiplies with; None for one that stays float32."""
        block = block_size(table_VD.shape[1])
        if block is None:
            return None
        packed, scale = self._packed(g, name, table_VD, block)
        rows = g.op("Reshape", packed, [table_VD.shape[0], -1])
        return g.op(
            "GatherBlockQuantized", rows, ids, scale,
            domain=CONTRIB, gather_axis=0, quantize_axis=1, block_size=block, bits=self.bits,
        )  # fmt: skip

    def _packed(self, g: Graph, name: str, weight_NK: np.ndarray, block: int) -> tuple[str, str]:
        if f"{name}.scale" not in g.root.initializers:
            codes, scale = quantize_blocks(weight_NK, self.bits, block)
            packed = codes if self.bits == 8 else codes[:, ::2] | codes[:, 1::2] << 4
            g.weight(name, packed.reshape(len(packed), -1, block * self.bits // 8))
            g.weight(f"{name}.scale", scale)
        return name, f"{name}.scale"

    def _multiply(self, g: Graph, x: str, name: str, layers: Sequence[Any], tied: bool) -> str:
        weight_NK = np.concatenate([array(layer.weight) for layer in layers])
        outputs, inputs = weight_NK.shape
        block = block_size(inputs)
        if block is None:
            return FLOAT.multiply(g, x, name, layers, tied)
        packed, scale = self._packed(g, name, weight_NK, block)
        return g.op(
            "MatMulNBits", x, packed, scale,
            domain=CONTRIB, K=inputs, N=outputs, bits=self.bits, block_size=block, accuracy_level=4,
        )  # fmt: skip
