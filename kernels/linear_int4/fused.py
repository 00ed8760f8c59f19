"""The affine 4-bit linear layer as torch sees it: one opaque product with its gradient, run by an implementation."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from neural_layers.kernels.arguments import accumulation_dtype
from neural_layers.kernels.c_library import unwatched
from neural_layers.kernels.dequantize_int4.pytorch import weight_in
from neural_layers.kernels.int4 import QuantizedInt4
from neural_layers.kernels.linear_int4 import native, pytorch

# name → run(x, quantized, bias)
IMPLEMENTATIONS: dict[str, Callable[..., Tensor]] = {"native": native.product, "torch": pytorch.product}


def linear_int4_native(x: Tensor, quantized: QuantizedInt4, bias: Tensor | None = None) -> Tensor:
    """y = x Wᵀ + bias in C; for few rows with no copy of W."""
    return _call(x, quantized, bias, "native")


def linear_int4_torch(x: Tensor, quantized: QuantizedInt4, bias: Tensor | None = None) -> Tensor:
    """y = x Wᵀ + bias through a dequantized copy of W that lives for the call."""
    return _call(x, quantized, bias, "torch")


def _call(x: Tensor, quantized: QuantizedInt4, bias: Tensor | None, backend: str) -> Tensor:
    if not x.is_meta and unwatched(x, quantized.packed, bias):
        return IMPLEMENTATIONS[backend](x, quantized, bias)
    q = quantized
    return _product(x, q.packed, q.scale, q.zero_point, bias, q.block_size, backend)


@torch.library.custom_op("neural_layers::linear_int4", mutates_args=())
def _product(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bias: Tensor | None,
    block_size: int,
    backend: str,
) -> Tensor:
    return IMPLEMENTATIONS[backend](x, _record(x, packed, scale, zero_point, block_size), bias)


def _record(x: Tensor, packed: Tensor, scale: Tensor, zero_point: Tensor, block_size: int) -> QuantizedInt4:
    return QuantizedInt4(packed, scale, zero_point, block_size, (packed.shape[0], x.shape[-1]), torch.float32)


@_product.register_fake
def _(
    x: Tensor,
    packed: Tensor,
    scale: Tensor,
    zero_point: Tensor,
    bias: Tensor | None,
    block_size: int,
    backend: str,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], packed.shape[0])


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    x, packed, scale, zero_point, bias, ctx.block_size, _backend = inputs
    ctx.save_for_backward(packed, scale, zero_point)
    ctx.inputs, ctx.x_dtype, ctx.bias_dtype = x.shape[-1], x.dtype, None if bias is None else bias.dtype


def _differentiate(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    grad_x = grad_bias = None
    wide = grad_y.to(accumulation_dtype(grad_y))
    if ctx.needs_input_grad[0]:
        packed, scale, zero_point = ctx.saved_tensors
        shape = (packed.shape[0], ctx.inputs)
        record = QuantizedInt4(packed, scale, zero_point, ctx.block_size, shape, wide.dtype)
        # Inside autocast the product would otherwise run in another dtype.
        with torch.autocast(grad_y.device.type, enabled=False):
            grad_x = (wide @ weight_in(record, wide.dtype)).to(ctx.x_dtype)
    if ctx.needs_input_grad[4]:
        grad_bias = wide.reshape(-1, wide.shape[-1]).sum(dim=0).to(ctx.bias_dtype)
    return (grad_x, None, None, None, grad_bias, None, None)


_product.register_autograd(_differentiate, setup_context=_save)
