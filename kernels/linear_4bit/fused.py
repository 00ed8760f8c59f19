"""The 4-bit linear layer as torch sees it: one opaque product with its gradient, run by one of the implementations.

The product is linear in x, and its gradient is the same op with the weight the other way round: so it is differentiable
to any order, and saves nothing but the record.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from neural_layers.kernels.arguments import accumulation_dtype
from neural_layers.kernels.c_library import unwatched
from neural_layers.kernels.four_bit import Quantized4bit
from neural_layers.kernels.linear_4bit import native, pytorch
from neural_layers.kernels.triton_support import deferred

# name → run(x, quantized, bias, transposed) → x Wᵀ + bias, or x W where transposed
IMPLEMENTATIONS: dict[str, Callable[..., Tensor]] = {
    "native": native.product,
    "native_int8": native.product_int8,
    "triton": deferred("linear_4bit.triton_kernels", "product"),
    "torch": pytorch.product,
}


def linear_4bit_native(x: Tensor, quantized: Quantized4bit, bias: Tensor | None = None) -> Tensor:
    """y = x Wᵀ + bias in C, with no copy of W."""
    return _call(x, quantized, bias, "native")


def linear_4bit_int8(x: Tensor, quantized: Quantized4bit, bias: Tensor | None = None) -> Tensor:
    """y = x Wᵀ + bias in C, with x and the codes of W rounded to 8 bits."""
    return _call(x, quantized, bias, "native_int8")


def linear_4bit_triton(x: Tensor, quantized: Quantized4bit, bias: Tensor | None = None) -> Tensor:
    """y = x Wᵀ + bias in Triton, with no copy of W but for many rows."""
    return _call(x, quantized, bias, "triton")


def linear_4bit_torch(x: Tensor, quantized: Quantized4bit, bias: Tensor | None = None) -> Tensor:
    """y = x Wᵀ + bias through a dequantized copy of W that lives for the call."""
    return _call(x, quantized, bias, "torch")


def _call(x: Tensor, quantized: Quantized4bit, bias: Tensor | None, backend: str) -> Tensor:
    if not x.is_meta and unwatched(x, quantized.packed, bias):
        return IMPLEMENTATIONS[backend](x, quantized, bias, False)
    q = quantized
    outputs, inputs = q.shape
    return _product(
        x,
        q.packed,
        q.absmax,
        q.offset,
        q.nested_absmax,
        bias,
        q.quant_type,
        q.block_size,
        outputs,
        inputs,
        False,
        backend,
    )


@torch.library.custom_op("neural_layers::linear_4bit", mutates_args=())
def _product(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    offset: Tensor | None,
    nested_absmax: Tensor | None,
    bias: Tensor | None,
    quant_type: str,
    block_size: int,
    outputs: int,
    inputs: int,
    transposed: bool,
    backend: str,
) -> Tensor:
    """x Wᵀ + bias, or x W where transposed."""
    shape = (outputs, inputs)
    quantized = Quantized4bit(packed, absmax, quant_type, block_size, shape, torch.float32, offset, nested_absmax)
    return IMPLEMENTATIONS[backend](x, quantized, bias, transposed)


@_product.register_fake
def _(
    x: Tensor,
    packed: Tensor,
    absmax: Tensor,
    offset: Tensor | None,
    nested_absmax: Tensor | None,
    bias: Tensor | None,
    quant_type: str,
    block_size: int,
    outputs: int,
    inputs: int,
    transposed: bool,
    backend: str,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], inputs if transposed else outputs)


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    _x, packed, absmax, offset, nested_absmax, bias, *ctx.layout, ctx.transposed, ctx.backend = inputs
    ctx.save_for_backward(packed, absmax, offset, nested_absmax)
    ctx.bias_dtype = None if bias is None else bias.dtype


def _differentiate(ctx: Any, grad_y: Tensor) -> tuple[Tensor | None, ...]:
    grad_x = grad_bias = None
    if ctx.needs_input_grad[0]:
        grad_x = _product(grad_y, *ctx.saved_tensors, None, *ctx.layout, not ctx.transposed, ctx.backend)
    if ctx.needs_input_grad[5]:
        wide = grad_y.to(accumulation_dtype(grad_y)).reshape(-1, grad_y.shape[-1])
        grad_bias = wide.sum(dim=0).to(ctx.bias_dtype)
    return (grad_x, None, None, None, None, grad_bias, *[None] * 6)


_product.register_autograd(_differentiate, setup_context=_save)
