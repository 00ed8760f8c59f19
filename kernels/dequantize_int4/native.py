"""Affine 4-bit dequantization in C (backend `native`): native.c."""

from struct import Struct

import torch
from torch import Tensor

from neural_layers.kernels import c_library
from neural_layers.kernels.int4 import QuantizedInt4

# The struct Call of native.c.
_pack = Struct("4P5q").pack


def dequantize_int4_native(quantized: QuantizedInt4) -> Tensor:
    """w_oi = scale_og · (code_oi − zero_point_og)."""
    q = quantized
    if c_library.unwatched(q.packed, q.scale, q.zero_point) and not q.packed.is_meta:
        return restore(q, q.dtype)
    return _restore_op(q.packed, q.scale, q.zero_point, q.block_size, q.shape[1], q.dtype)


def restore(quantized: QuantizedInt4, dtype: torch.dtype) -> Tensor:
    """The weight (out, in) in `dtype`, computed now."""
    bits = [quantized.packed.contiguous(), quantized.zero_point.contiguous(), quantized.scale.contiguous()]
    weight = quantized.packed.new_empty(quantized.shape, dtype=dtype)
    arithmetic = torch.float64 if dtype == torch.float64 else torch.float32
    addresses = [tensor.data_ptr() for tensor in (*bits, weight)]
    sizes = (*quantized.shape, quantized.block_size, c_library.code(weight, arithmetic), torch.get_num_threads())
    c_library.record_function("dequantize_int4", arithmetic)(_pack(*addresses, *sizes))
    return weight


@torch.library.custom_op("neural_layers::dequantize_int4", mutates_args=())
def _restore_op(
    packed: Tensor, scale: Tensor, zero_point: Tensor, block_size: int, inputs: int, dtype: torch.dtype
) -> Tensor:
    """What torch sees of `restore`, where a graph is traced."""
    return restore(QuantizedInt4(packed, scale, zero_point, block_size, (packed.shape[0], inputs), dtype), dtype)


@_restore_op.register_fake
def _(packed: Tensor, scale: Tensor, zero_point: Tensor, block_size: int, inputs: int, dtype: torch.dtype) -> Tensor:
    return packed.new_empty(packed.shape[0], inputs, dtype=dtype)
