"""4-bit dequantization as torch sees it: one opaque op without a gradient, run by one of the implementations."""

from collections.abc import Callable

import torch
from torch import Tensor

from neural_layers.kernels.c_library import unwatched
from neural_layers.kernels.dequantize_4bit import native
from neural_layers.kernels.four_bit import Quantized4bit
from neural_layers.kernels.triton_support import deferred

# name → run(quantized) → the weight
IMPLEMENTATIONS: dict[str, Callable[[Quantized4bit], Tensor]] = {
    "native": native.dequantize,
    "triton": deferred("dequantize_4bit.triton_kernels", "dequantize"),
}


def dequantize_4bit_native(quantized: Quantized4bit) -> Tensor:
    """w_i = value of code_i · absmax of its block, in C."""
    return _call(quantized, "native")


def dequantize_4bit_triton(quantized: Quantized4bit) -> Tensor:
    """w_i = value of code_i · absmax of its block, in Triton."""
    return _call(quantized, "triton")


def _call(quantized: Quantized4bit, backend: str) -> Tensor:
    q = quantized
    if unwatched(q.packed, q.absmax):
        return IMPLEMENTATIONS[backend](q)
    constants = (q.quant_type, q.block_size, q.shape, q.dtype)
    return _dequantize(q.packed, q.absmax, q.offset, q.nested_absmax, *constants, backend)


@torch.library.custom_op("neural_layers::dequantize_4bit", mutates_args=())
def _dequantize(
    packed: Tensor,
    absmax: Tensor,
    offset: Tensor | None,
    nested_absmax: Tensor | None,
    quant_type: str,
    block_size: int,
    shape: list[int],
    dtype: torch.dtype,
    backend: str = "native",
) -> Tensor:
    """What torch sees of an implementation, where a graph is traced."""
    record = Quantized4bit(packed, absmax, quant_type, block_size, tuple(shape), dtype, offset, nested_absmax)
    return IMPLEMENTATIONS[backend](record)


@_dequantize.register_fake
def _(
    packed: Tensor,
    absmax: Tensor,
    offset: Tensor | None,
    nested_absmax: Tensor | None,
    quant_type: str,
    block_size: int,
    shape: list[int],
    dtype: torch.dtype,
    backend: str = "native",
) -> Tensor:
    return packed.new_empty(shape, dtype=dtype)
