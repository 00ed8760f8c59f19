"""The 8-bit linear layer as torch sees it: one opaque product with its gradient, run by one of the implementations."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from neural_layers.kernels.arguments import accumulation_dtype
from neural_layers.kernels.c_library import unwatched
from neural_layers.kernels.linear_int8 import native, pytorch

# name → run(x, weight, scale, bias, input_scale, input_zero_point)
IMPLEMENTATIONS: dict[str, Callable[..., Tensor]] = {"native": native.product, "torch": pytorch.product}


def linear_int8_native(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    input_scale: Tensor | None = None,
    input_zero_point: Tensor | None = None,
) -> Tensor:
    """The product of integers in C."""
    return _call(x, weight, scale, bias, input_scale, input_zero_point, "native")


def linear_int8_torch(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None = None,
    *,
    input_scale: Tensor | None = None,
    input_zero_point: Tensor | None = None,
) -> Tensor:
    """The product of integers by torch."""
    return _call(x, weight, scale, bias, input_scale, input_zero_point, "torch")


def _call(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
    backend: str,
) -> Tensor:
    arguments = (x, weight, scale, bias, input_scale, input_zero_point)
    if not x.is_meta and unwatched(*arguments):
        return IMPLEMENTATIONS[backend](*arguments)
    return _product(*arguments, backend)


@torch.library.custom_op("neural_layers::linear_int8", mutates_args=())
def _product(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
    backend: str,
) -> Tensor:
    return IMPLEMENTATIONS[backend](x, weight, scale, bias, input_scale, input_zero_point)


@_product.register_fake
def _(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
    backend: str,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, weight, scale, bias, *_ = inputs
    ctx.save_for_backward(weight, scale)
    ctx.x_dtype, ctx.bias_dtype = x.dtype, None if bias is None else bias.dtype


def _differentiate(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    weight, scale = ctx.saved_tensors
    grad_x = grad_bias = None
    wide = grad_y.to(accumulation_dtype(grad_y))
    if ctx.needs_input_grad[0]:
        # Inside autocast the product would otherwise run in another dtype.
        with torch.autocast(grad_y.device.type, enabled=False):
            grad_x = ((wide * scale.to(wide.dtype)) @ weight.to(wide.dtype)).to(ctx.x_dtype)
    if ctx.needs_input_grad[3]:
        grad_bias = wide.reshape(-1, wide.shape[-1]).sum(dim=0).to(ctx.bias_dtype)
    return (grad_x, None, None, grad_bias, None, None, None)


_product.register_autograd(_differentiate, setup_context=_save)
