"""A linear layer over a 4-bit weight."""

import torch
from torch import Tensor

from neural_layers.kernels.arguments import check_devices, check_floats
from neural_layers.kernels.dispatch import Backend, Op
from neural_layers.kernels.four_bit import Quantized4bit, check_quantized
from neural_layers.kernels.linear_4bit.fused import linear_4bit_torch
from neural_layers.kernels.linear_4bit.reference import linear_4bit_reference


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


_OP = Op(
    "linear_4bit",
    check=_check,
    backends=(
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
    Raises TypeError and ValueError for arguments that do not fit, BackendError for a backend that cannot run.
    """
    if x.is_floating_point() and x.dtype != torch.float64 and torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    return _OP(backend, x, quantized, bias)
