"""The nodes that multiply by a linear layer's weight, for each kind of layer that there is.

- `nn.Linear`: `MatMul`; with `quantize` "int8" or "int4" of the export, `MatMulNBits` (see `blocks.py`).
- `Linear4bit`: `MatMulBnb4`, NF4 or FP4, the bits as they are and double-quantized scales decoded. It restores the
  weight in float32 in every call and multiplies in float32: exact, small, and slower than float32 for a single row.
- `LinearInt4`: `MatMulNBits` with zero points at accuracy level 4: activations are rounded to 8 bits in each block.
- `LinearHalf`: the weight is stored in its 16 bits; ONNX Runtime restores it as it loads and multiplies in float32.
- `LinearInt8`: the layer's own arithmetic. Dynamic, of standard operators: a scale for each row, codes around 128 and
  `MatMulInteger`. (`DynamicQuantizeLinear` would have one scale for all rows of a call, so that what a token computes
  would depend on what else is in the batch.) Static: QuantizeLinear and DequantizeLinear around `MatMul`, which ONNX
  Runtime makes one product of integers.

Letters: K inputs, N outputs.
"""

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from neural_layers.errors import InputError
from neural_layers.kernels.four_bit import decode_absmax
from neural_layers.kernels.int8 import LARGEST, TINY
from neural_layers.linear import Linear
from neural_layers.linear_4bit import Linear4bit
from neural_layers.linear_int4 import LinearInt4
from neural_layers.linear_int8 import LinearInt8
from neural_layers.models.export.graph import CONTRIB, Graph
from neural_layers.wrappers.quantization.half import LinearHalf

BNB4_TYPES = {"fp4": 0, "nf4": 1}
BNB4_LARGEST = 256  # weights of a block, in MatMulBnb4
_MIDDLE = 128  # the uint8 code of 0; ONNX Runtime's products of uint8 and int8 are ten times as fast as of two int8


def array(tensor: Any) -> np.ndarray:
    """A parameter as float32."""
    values: np.ndarray = tensor.detach().float().cpu().numpy()
    return values


def codes(tensor: Any) -> np.ndarray:
    """The bits of a quantized weight, or of one in 16 bits."""
    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bfloat16:
        from ml_dtypes import bfloat16  # comes with onnx

        values: np.ndarray = tensor.view(torch.int16).numpy().view(bfloat16)
    else:
        values = tensor.numpy()
    return values


@dataclass(frozen=True)
class Product:
    """How layers of one kind are multiplied with.

    key: layers side by side with equal keys share one product. multiply: (g, x, name, layers, tied) → x (…, K) times
    the weights of all layers, stored under `name`: (…, N₁ + N₂ + …), without bias. Where `tied`, the weight of the one
    layer is stored as `tables.embed` reads its rows.
    """

    key: Callable[[Any], Hashable]
    multiply: Callable[[Graph, str, str, Sequence[Any], bool], str]


def product_of(layer: Any, name: str) -> Product:
    """The product of a quantized or plain linear layer; raises InputError for any other module."""
    if is_plain(layer):
        return FLOAT
    if type(layer) in QUANTIZED:
        return QUANTIZED[type(layer)]
    known = ", ".join(kind.__name__ for kind in (nn.Linear, *QUANTIZED))
    raise InputError(
        f"{type(layer).__name__} ({name}) cannot be exported; exported are {known}. Merge adapters with fold_lora, and "
        "convert a model that was prepared for int8_qat with convert_qat"
    )


def is_plain(layer: Any) -> bool:
    """Whether a layer computes x Wᵀ + b with its `weight`; a subclass with a forward of its own need not."""
    return isinstance(layer, nn.Linear) and type(layer).forward in (nn.Linear.forward, Linear.forward)


def _float(g: Graph, x: str, name: str, layers: Sequence[Any], tied: bool) -> str:
    is_half = isinstance(layers[0], LinearHalf)
    weight_NK = np.concatenate([codes(layer.weight) if is_half else array(layer.weight) for layer in layers])
    stored = g.weight(name, weight_NK if tied else weight_NK.T)
    weight = g.op("Cast", stored, to=1) if is_half else stored
    if not tied:
        return g.op("MatMul", x, weight)
    # Gemm takes the table as it lies; its rows are the tokens of the whole batch.
    flat = g.op("Reshape", x, [-1, weight_NK.shape[1]])
    y = g.op("Gemm", flat, weight, transB=1)
    return g.op("Reshape", y, g.concat(g.op("Shape", x, start=0, end=2), [weight_NK.shape[0]]))


def store_4bit(g: Graph, name: str, layers: Sequence[Any]) -> tuple[str, str, int]:
    """Names of the codes (bytes,) and the float32 absmax (blocks,) of 4-bit weights one after another, and how many
    weights share an absmax: what MatMulBnb4 takes no larger blocks than 256 of is told to it in pieces."""
    first = layers[0]
    size = min(first.block_size, BNB4_LARGEST)
    packed = g.weight(name, np.concatenate([codes(layer.weight).reshape(-1) for layer in layers]))
    absmax = []
    for layer in layers:
        pieces = -(-layer.quantized.numel // size)
        absmax.append(array(decode_absmax(layer.quantized)).repeat(layer.block_size // size)[:pieces])
    return packed, g.weight(f"{name}.absmax", np.concatenate(absmax)), size


def _key_4bit(layer: Linear4bit) -> Hashable:
    # A block or a byte that two layers would share keeps them apart.
    is_whole = layer.quantized.numel % layer.block_size == 0
    return "4bit", layer.quant_type, layer.block_size, None if is_whole else id(layer)


def _bnb4(g: Graph, x: str, name: str, layers: Sequence[Any], tied: bool) -> str:
    packed, absmax, size = store_4bit(g, name, layers)
    first = layers[0]
    return g.op(
        "MatMulBnb4", x, packed, absmax,
        domain=CONTRIB, K=first.in_features, N=sum(layer.out_features for layer in layers),
        block_size=size, quant_type=BNB4_TYPES[first.quant_type],
    )  # fmt: skip


def store_int4(g: Graph, name: str, layers: Sequence[Any]) -> tuple[str, str, str]:
    """Names of codes uint8 (N, groups, bytes), scales (N, groups) and zero points, two a byte along the groups."""
    weight = np.concatenate([codes(layer.weight) for layer in layers])
    scale = np.concatenate([array(layer.scale) for layer in layers])
    zero = np.concatenate([codes(layer.zero_point) for layer in layers])
    zero = np.pad(zero, ((0, 0), (0, zero.shape[1] % 2)))
    return (
        g.weight(name, weight.reshape(*scale.shape, -1)),
        g.weight(f"{name}.scale", scale),
        g.weight(f"{name}.zero_point", zero[:, ::2] | zero[:, 1::2] << 4),
    )


def _nbits(g: Graph, x: str, name: str, layers: Sequence[Any], tied: bool) -> str:
    first, outputs = layers[0], sum(layer.out_features for layer in layers)
    return g.op(
        "MatMulNBits", x, *store_int4(g, name, layers),
        domain=CONTRIB, K=first.in_features, N=outputs, bits=4, block_size=first.block_size, accuracy_level=4,
    )  # fmt: skip


def _key_int8(layer: LinearInt8) -> Hashable:
    if layer.input_scale is None or layer.input_zero_point is None:
        return "int8", None
    return "int8", layer.input_scale.item(), layer.input_zero_point.item()


def _int8(g: Graph, x: str, name: str, layers: Sequence[Any], tied: bool) -> str:
    first = layers[0]
    weight = np.concatenate([codes(layer.weight) for layer in layers])
    # A table's rows are read as they lie; for the product ONNX Runtime turns it over once, as it loads.
    w_KN = g.op("Transpose", g.weight(name, weight), perm=[1, 0]) if tied else g.weight(name, weight.T)
    scale = g.weight(f"{name}.scale", np.concatenate([array(layer.scale) for layer in layers]))
    if first.static:
        given = np.array(first.input_scale.item(), np.float32), np.array(first.input_zero_point.item(), np.uint8)
        rounded = g.op("DequantizeLinear", g.op("QuantizeLinear", x, *given), *given)
        return g.op("MatMul", rounded, g.op("DequantizeLinear", w_KN, scale, axis=1))
    largest = g.op("ReduceMax", g.op("Abs", x), [-1], keepdims=1)
    # 0 for a row of zeros, whose reciprocal would be infinite
    inverse = g.op("Where", g.op("Less", largest, TINY), 0.0, g.op("Div", float(LARGEST), largest))
    middle = np.array(_MIDDLE, np.uint8)
    row_codes = g.op("QuantizeLinear", g.op("Mul", x, inverse), 1.0, middle)
    sums = g.op("Cast", g.op("MatMulInteger", row_codes, w_KN, middle), to=1)
    return g.op("Mul", g.op("Mul", sums, g.op("Div", largest, float(LARGEST))), scale)


FLOAT = Product(lambda layer: "float", _float)
QUANTIZED: dict[type, Product] = {
    LinearHalf: Product(lambda layer: layer.weight.dtype, _float),
    Linear4bit: Product(_key_4bit, _bnb4),
    LinearInt4: Product(lambda layer: ("int4", layer.block_size), _nbits),
    LinearInt8: Product(_key_int8, _int8),
}
