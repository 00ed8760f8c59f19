"""The weight that an affine 4-bit record stands for."""

from torch import Tensor

from neural_layers.kernels import c_library
from neural_layers.kernels.dequantize_int4.native import dequantize_int4_native
from neural_layers.kernels.dequantize_int4.pytorch import dequantize_int4_torch
from neural_layers.kernels.dequantize_int4.reference import dequantize_int4_reference
from neural_layers.kernels.dispatch import Backend, Op
from neural_layers.kernels.int4 import QuantizedInt4, check_quantized


def _native_obstacle(quantized: QuantizedInt4) -> str | None:
    return c_library.obstacle(quantized.packed)


_OP = Op(
    "dequantize_int4",
    check=check_quantized,
    backends=(
        Backend(
            "native", dequantize_int4_native, _native_obstacle, describe=c_library.describe, missing=c_library.MISSING
        ),
        Backend("torch", dequantize_int4_torch),
        Backend("reference", dequantize_int4_reference),
    ),
)


def dequantize_int4(quantized: QuantizedInt4, *, backend: str = "auto") -> Tensor:
    """w_oi = scale_og · (code_oi − zero_point_og), for a weight that `quantize_int4` made; g is the group of input i.

    The product is taken in float32 (in float64 where `quantized.dtype` is float64) and rounded to `quantized.dtype`.
    Returns the weight (out, in) in `quantized.dtype`; it carries no gradient.
    Raises TypeError and ValueError for a record whose tensors do not fit, BackendError for a backend that cannot run.
    """
    return _OP(backend, quantized)
