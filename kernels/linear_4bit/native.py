"""The 4-bit linear layer in C (backend `native`): native.c."""

from functools import cache

import torch
from torch import Tensor

from neural_layers.kernels import c_library
from neural_layers.kernels.arguments import accumulation_dtype
from neural_layers.kernels.dequantize_4bit.native import dequantize, weight_arguments
from neural_layers.kernels.four_bit import Quantized4bit


_BFLOAT16, _INT8 = 1, 2
_GROUP = 128


@cache
def features() -> int:
    """What the processor has beside its variant: _BFLOAT16 and _INT8 products of vectors, added up."""
    found = torch.zeros(1, dtype=torch.int64, device="cpu")
    c_library.function("linear_4bit_features", torch.float32)(found)
    return int(found)


def product(x: Tensor, quantized: Quantized4bit, bias: Tensor | None, transposed: bool) -> Tensor:
    """x Wᵀ + bias, or x W where transposed."""
    outputs, inputs = quantized.shape
    dtype = accumulation_dtype(x)
    x = x.contiguous()
    y = x.new_empty(*x.shape[:-1], outputs)
    wide = None if bias is None else bias.to(dtype).contiguous()
    sizes = (y.numel() // max(outputs, 1), inputs, outputs, torch.get_num_threads())
    weight = weight_arguments(quantized)
    in_groups = inputs % _GROUP == 0 and quantized.block_size >= _GROUP // 2
    if x.dtype == torch.bfloat16 and in_groups and features() & _BFLOAT16:
        c_library.function("linear_4bit_bfloat16", dtype)(*weight, x, wide, y, *sizes)
    else:
        c_library.function("linear_4bit", dtype)(*weight, x, c_library.code(x, dtype), wide, y, *sizes)
    return y
