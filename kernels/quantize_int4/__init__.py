"""Quantizing a weight to 4 bits with a scale and a zero point for each group."""

from torch import Tensor

from neural_layers.kernels.arguments import check_floats
from neural_layers.kernels.dispatch import Backend, Op
from neural_layers.kernels.int4 import QuantizedInt4, check_block_size
from neural_layers.kernels.quantize_int4.pytorch import quantize_int4_torch
from neural_layers.kernels.quantize_int4.reference import quantize_int4_reference


def _check(weight: Tensor, block_size: int) -> None:
    check_floats(weight=weight)
    check_block_size(block_size)
    if weight.ndim != 2:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; expected (out, in)")


_OP = Op(
    "quantize_int4",
    check=_check,
    backends=(Backend("torch", quantize_int4_torch), Backend("reference", quantize_int4_reference)),
)


def quantize_int4(weight: Tensor, block_size: int = 64, *, backend: str = "auto") -> QuantizedInt4:
    """Round a weight to 16 evenly spaced levels for each group of inputs (affine quantization, arXiv 1712.05877).

    With low ≤ 0 ≤ high the ends of a group:
    scale = (high − low) / 15;  zero_point = round(−low / scale);  code = clamp(round(w / scale) + zero_point, 0, 15)

    weight:     (out, in), float64 to float16. Quantized in float32: a float64 weight is rounded to that first.
    block_size: inputs in a group: 16, 32, 64, 128 or 256. The last group of a row may be shorter.

    Returns a `QuantizedInt4`, laid out for ONNX Runtime's MatMulNBits; it carries no gradient. Ties round to even. A
    group that holds NaN or infinity dequantizes to NaN, one of steps below 2^-120 to zero.
    Raises TypeError for a weight that is not a float, ValueError for another shape or block_size, BackendError for a
    backend that cannot run.
    """
    return _OP(backend, weight, block_size)
