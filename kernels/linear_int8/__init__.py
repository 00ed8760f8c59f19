"""A linear layer over an 8-bit weight, with activations in 8 bits."""

import torch
from torch import Tensor

from neural_layers.kernels import c_library
from neural_layers.kernels.arguments import check_devices, check_floats
from neural_layers.kernels.dispatch import Backend, Op
from neural_layers.kernels.linear_int8.fused import linear_int8_native, linear_int8_torch
from neural_layers.kernels.linear_int8.native import MOST_INPUTS
from neural_layers.kernels.linear_int8.reference import linear_int8_reference

# What autocast casts for a linear layer.
_CAST = (torch.float32, torch.bfloat16, torch.float16)


def _check(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    *,
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
) -> None:
    check_floats(x=x, scale=scale, bias=bias, input_scale=input_scale)
    check_devices(
        x=x, weight=weight, scale=scale, bias=bias, input_scale=input_scale, input_zero_point=input_zero_point
    )
    if weight.dtype != torch.int8:
        raise TypeError(f"weight has dtype {weight.dtype}; expected torch.int8")
    if weight.ndim != 2 or x.ndim == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"x has shape {tuple(x.shape)} and weight {tuple(weight.shape)}; expected (…, inputs), (outputs, inputs)"
        )
    for name, tensor in (("scale", scale), ("bias", bias)):
        if tensor is not None and tensor.shape != weight.shape[:1]:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {tuple(weight.shape[:1])}")
    if (input_scale is None) != (input_zero_point is None):
        raise ValueError("input_scale and input_zero_point must be given together, or both be None")
    if input_scale is not None and input_zero_point is not None:
        if input_zero_point.dtype != torch.int32:
            raise TypeError(f"input_zero_point has dtype {input_zero_point.dtype}; expected torch.int32")
        for name, tensor in (("input_scale", input_scale), ("input_zero_point", input_zero_point)):
            if tensor.ndim:
                raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected () for all inputs")


def _native_obstacle(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    *,
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
) -> str | None:
    if weight.shape[1] > MOST_INPUTS:
        return f"it adds up the products of at most {MOST_INPUTS} inputs"
    return c_library.obstacle(x, weight, scale, bias, input_scale, input_zero_point)


_OP = Op(
    "linear_int8",
    check=_check,
    backends=(
        Backend("native", linear_int8_native, _native_obstacle, describe=c_library.describe, missing=c_library.MISSING),
        Backend("torch", linear_int8_torch),
        Backend("reference", linear_int8_reference),
    ),
)


def linear_int8(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    input_scale: Tensor | None = None,
    input_zero_point: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """y_o = scale_o · Σ_i x̂_i · weight_oi + bias_o with 8-bit weights and x̂, which is x in 8 bits (arXiv 1712.05877).

    x: (..., in), float64 to float16; weight: int8 (out, in); scale: float (out,), bias: (out,).
    Dynamic, without input_scale: each row of x has a scale of its own, max |x| / 127, and x̂ = that · round(x / that).
    What a token becomes depends on no other. A row that holds NaN or infinity gives NaN.
    Static: with input_scale s, float (), and input_zero_point z, int32 (),
    x̂ = s · (clamp(round(x / s) + z, 0, 255) − z). NaN gives NaN for its row, infinity an end of the range.
    Ties round to even, in float32 whatever the dtype of x. The sums of products of codes are integers, exact and the
    same on every backend; the scales multiply them in float32, in float64 where x is float64.
    Returns (..., out) in the dtype of x. Inside `torch.autocast`, x is cast to its dtype first, as for any linear.

    Differentiable in x and bias to any order; weight and scales are frozen, and the rounding of x counts as the
    identity.
    Raises TypeError and ValueError for arguments that do not fit, BackendError for a backend that cannot run.
    """
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device) and x.dtype in _CAST:
        x = x.to(torch.get_autocast_dtype(device))
    return _OP(backend, x, weight, scale, bias, input_scale=input_scale, input_zero_point=input_zero_point)
