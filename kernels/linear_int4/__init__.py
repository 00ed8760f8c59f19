"""A linear layer over a weight in 4 bits with a scale and a zero point for each group."""

import torch
from torch import Tensor

from neural_layers.kernels import c_library
from neural_layers.kernels.arguments import check_devices, check_floats
from neural_layers.kernels.dispatch import Backend, Op
from neural_layers.kernels.int4 import QuantizedInt4, check_quantized
from neural_layers.kernels.linear_int4.fused import linear_int4_native, linear_int4_torch
from neural_layers.kernels.linear_int4.reference import linear_int4_reference

# What autocast casts for a linear layer.
_CAST = (torch.float32, torch.bfloat16, torch.float16)


def _check(x: Tensor, quantized: QuantizedInt4, bias: Tensor | None) -> None:
    check_floats(x=x, bias=bias)
    check_quantized(quantized)
    check_devices(x=x, weight=quantized.packed, bias=bias)
    if x.ndim == 0 or x.shape[-1] != quantized.shape[1]:
        raise ValueError(f"x has shape {tuple(x.shape)}; expected (..., in) for a weight (out, in) = {quantized.shape}")
    if bias is not None and bias.shape != quantized.shape[:1]:
        raise ValueError(f"bias has shape {tuple(bias.shape)}; expected (out,) = {quantized.shape[:1]}")


def _native_obstacle(x: Tensor, quantized: QuantizedInt4, bias: Tensor | None) -> str | None:
    return c_library.obstacle(x, quantized.packed, bias)


_OP = Op(
    "linear_int4",
    check=_check,
    backends=(
        Backend("native", linear_int4_native, _native_obstacle, describe=c_library.describe, missing=c_library.MISSING),
        Backend("torch", linear_int4_torch),
        Backend("reference", linear_int4_reference),
    ),
)


def linear_int4(x: Tensor, quantized: QuantizedInt4, bias: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """y = x Wᵀ + bias with a weight W that stays in 4 bits: W_oi = scale_og · (code_oi − zero_point_og).

    x: (..., in), bias: (out,), float64 to float16; quantized: the record of a weight (out, in), whose own dtype plays
    no part. Sums are kept in float32, in float64 where x is float64. W is not rounded to less than the dtype of x.
    Returns (..., out) in the dtype of x. Inside `torch.autocast`, x is cast to its dtype first, as for any linear.

    Differentiable to any order in x and bias; W is frozen. Nothing of the size of W is kept for the backward pass.
    Raises TypeError and ValueError for arguments that do not fit, BackendError for a backend that cannot run.
    """
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) and x.dtype in _CAST:
        x = x.to(torch.get_autocast_dtype(device))
    return _OP(backend, x, quantized, bias)
