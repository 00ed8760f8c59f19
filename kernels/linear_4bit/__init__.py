"""A linear layer over a 4-bit weight."""

import torch
from torch import Tensor

from neural_layers.kernels import c_library, triton_support
from neural_layers.kernels.arguments import check_devices, check_floats
from neural_layers.kernels.dispatch import Backend, Op
from neural_layers.kernels.four_bit import Quantized4bit, check_quantized
from neural_layers.kernels.linear_4bit.fused import (
    linear_4bit_int8,
    linear_4bit_native,
    linear_4bit_torch,
    linear_4bit_triton,
)
from neural_layers.kernels.linear_4bit.native import int8_obstacle
from neural_layers.kernels.linear_4bit.reference import linear_4bit_reference

# What autocast casts for a linear layer.
_CAST = (torch.float32, torch.bfloat16, torch.float16)


def _check(x: Tensor, quantized: Quantized4bit, bias: Tensor | None) -> None:
    check_floats(x=x, bias=bias)
    check_quantized(quantized)
    check_devices(x=x, weight=quantized.packed, bias=bias)
    if len(quantized.shape) != 2:
        raise ValueError(f"the quantized weight has shape {quantized.shape}; expected (out, in)")
    if x.ndim == 0 or x.shape[-1] != quantized.shape[1]:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected (..., in) for a weight (out, in) = {quantized.shape}")
    if bias is not None and bias.shape != quantized.shape[:1]:
        raise ValueError(f"bias has shape {tuple(bias.shape)}; expected (out,) = {quantized.shape[:1]}")


def _native_obstacle(x: Tensor, quantized: Quantized4bit, bias: Tensor | None) -> str | None:
    return c_library.obstacle(x, quantized.packed, bias)


def _triton_obstacle(x: Tensor, quantized: Quantized4bit, bias: Tensor | None) -> str | None:
    return triton_support.obstacle(x, quantized.packed, bias)


def _int8_obstacle(x: Tensor, quantized: Quantized4bit, bias: Tensor | None) -> str | None:
    return _native_obstacle(x, quantized, bias) or int8_obstacle(x, quantized)


def _int8_avoid(x: Tensor, quantized: Quantized4bit, bias: Tensor | None) -> str:
    return "it rounds x to 8 bits, and is taken by name only"


_OP = Op(
    "linear_4bit",
    check=_check,
    backends=(
        Backend("native", linear_4bit_native, _native_obstacle, describe=c_library.describe, missing=c_library.MISSING),
        Backend("native_int8", linear_4bit_int8, _int8_obstacle, _int8_avoid, describe=c_library.describe),
        Backend("triton", linear_4bit_triton, _triton_obstacle, triton_support.avoid),
        Backend("torch", linear_4bit_torch),
        Backend("reference", linear_4bit_reference),
    ),
)


def linear_4bit(x: Tensor, quantized: Quantized4bit, bias: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """y = x Wᵀ + bias with a weight W that stays in 4 bits: W_oi = value of code_oi · absmax of its block.

    x: (..., in), bias: (out,), float64 to float16; quantized: the record of a weight (out, in), whose own dtype plays
    no part. Sums are kept in float32, in float64 where x is float64. W is not rounded to less than the dtype of x.
    Returns (..., out) in the dtype of x. Inside `torch.autocast`, x is cast to its dtype first, as for any linear.

    Differentiable to any order in x and bias; W is frozen. Nothing of the size of W is kept for the backward pass.

    `backend="native_int8"` is faster on processors with AVX-512 VNNI, and is taken only by name (or by
    `neural_layers.use_backend`): it rounds the codes to 8 bits, and x to 8 bits with a scale for each 64 inputs (for
    each 8 where there are at most four rows). For normally distributed x and W the error is 0.7 % of the root mean
    square of y (0.5 %), and about 1 % of the largest y at most; an outlier in x takes precision from the inputs that
    share its scale. Its gradient is that of the exact product.
    Raises TypeError and ValueError for arguments that do not fit, BackendError for a backend that cannot run.
    """
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) and x.dtype in _CAST:
        x = x.to(torch.get_autocast_dtype(device))
    return _OP(backend, x, quantized, bias)
