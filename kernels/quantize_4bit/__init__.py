"""Quantizing a weight to 4 bits."""

from torch import Tensor

from neural_layers.kernels import c_library
from neural_layers.kernels.arguments import check_floats
from neural_layers.kernels.dispatch import Backend, Op
from neural_layers.kernels.four_bit import Quantized4bit, check_format
from neural_layers.kernels.quantize_4bit.native import quantize_4bit_native
from neural_layers.kernels.quantize_4bit.pytorch import quantize_4bit_torch
from neural_layers.kernels.quantize_4bit.reference import quantize_4bit_reference


def _check(weight: Tensor, quant_type: str, block_size: int, double_quant: bool) -> None:
    check_floats(weight=weight)
    check_format(quant_type, block_size)


def _native_obstacle(weight: Tensor, quant_type: str, block_size: int, double_quant: bool) -> str | None:
    return c_library.obstacle(weight)


_OP = Op(
    "quantize_4bit",
    check=_check,
    backends=(
        Backend(
            "native", quantize_4bit_native, _native_obstacle, describe=c_library.describe, missing=c_library.MISSING
        ),
        Backend("torch", quantize_4bit_torch),
        Backend("reference", quantize_4bit_reference),
    ),
)


def quantize_4bit(
    weight: Tensor,
    quant_type: str = "nf4",
    block_size: int = 64,
    double_quant: bool = False,
    *,
    backend: str = "auto",
) -> Quantized4bit:
    """Round a weight to 16 levels of each block's largest magnitude: NF4 and FP4 of QLoRA (arXiv 2305.14314).

    absmax_b = max |w| over block b;  code_i = the nearest of the 16 codes to w_i / absmax_b, the lower one on a border

    weight:       any shape, float64 to float16. It is cut in row-major order into blocks, of which the last may be
                  shorter. Quantized in float32: a float64 weight is rounded to that first.
    quant_type:   "nf4" (quantiles of a normal distribution) or "fp4" (a 4-bit float)
    block_size:   32, 64, 128, 256, 512, 1024, 2048 or 4096
    double_quant: quantize the absmax to 8 bits as well, which saves 0.37 bits a weight at blocks of 64

    Returns a `Quantized4bit`, with the same bits as bitsandbytes on the CPU in packing, codes and absmax. It carries no
    gradient. A block that holds NaN or infinity has no levels: its absmax is NaN or infinity, and it dequantizes to NaN
    and infinities only.
    Raises TypeError for a weight that is not a float, ValueError for a quant_type or block_size that there is not,
    BackendError for a backend that cannot run.
    """
    return _OP(backend, weight, quant_type, block_size, double_quant)
