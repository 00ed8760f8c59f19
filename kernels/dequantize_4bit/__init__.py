"""The weight that a 4-bit record stands for."""

from torch import Tensor

from neural_layers.kernels import c_library, triton_support
from neural_layers.kernels.dequantize_4bit.fused import dequantize_4bit_native, dequantize_4bit_triton
from neural_layers.kernels.dequantize_4bit.pytorch import dequantize_4bit_torch
from neural_layers.kernels.dequantize_4bit.reference import dequantize_4bit_reference
from neural_layers.kernels.dispatch import Backend, Op
from neural_layers.kernels.four_bit import Quantized4bit, check_quantized


def _native_obstacle(quantized: Quantized4bit) -> str | None:
    return c_library.obstacle(quantized.packed)


def _triton_obstacle(quantized: Quantized4bit) -> str | None:
    return triton_support.obstacle(quantized.packed)


_OP = Op(
    "dequantize_4bit",
    check=check_quantized,
    backends=(
        Backend(
            "native", dequantize_4bit_native, _native_obstacle, describe=c_library.describe, missing=c_library.MISSING
        ),
        Backend("triton", dequantize_4bit_triton, _triton_obstacle, triton_support.avoid),
        Backend("torch", dequantize_4bit_torch),
        Backend("reference", dequantize_4bit_reference),
    ),
)


def dequantize_4bit(quantized: Quantized4bit, *, backend: str = "auto") -> Tensor:
    """w_i = value of code_i · absmax of its block, for a weight that `quantize_4bit` made.

    The product is taken in float32 (in float64 where `quantized.dtype` is float64) and rounded to `quantized.dtype`.
    Returns the weight in `quantized.shape` and `quantized.dtype`; it carries no gradient.
    Raises TypeError and ValueError for a record whose tensors do not fit, BackendError for a backend that cannot run.
    """
    return _OP(backend, quantized)
