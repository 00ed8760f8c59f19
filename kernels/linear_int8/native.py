"""The 8-bit linear layer in C (backend `native`): native.c."""

from struct import Struct

import torch
from torch import Tensor

from neural_layers.kernels.arguments import accumulation_dtype
from neural_layers.kernels.c_library import code, record_function
from neural_layers.kernels.prepared import FLOATS, Prepared, Tensors, head, is_preparable

# The struct Call of native.c after its head.
_constants = Struct("5P2q").pack
# The most inputs whose products surely add up to less than 2^31.
MOST_INPUTS = 1 << 16
# A thread takes some 20 µs to start, in which a core reads this many bytes of the weight, or multiplies so many times.
_LEAST_BYTES, _LEAST_PRODUCTS = 1 << 20, 1 << 22


def product(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    bias: Tensor | None,
    input_scale: Tensor | None,
    input_zero_point: Tensor | None,
) -> Tensor:
    """x̂ · weightᵀ in integers, times the scales, + bias."""
    dtype = accumulation_dtype(x)
    x, weight, scale = x.contiguous(), weight.contiguous(), scale.to(dtype).contiguous()
    bias = None if bias is None else bias.to(dtype).contiguous()
    input_scale = None if input_scale is None else input_scale.float()
    outputs, inputs = weight.shape
    y = x.new_empty(*x.shape[:-1], outputs)
    rows = x.shape[:-1].numel()
    threads = torch.get_num_threads() if rows >= _threads_from(weight) else 1
    start = head(x.data_ptr(), y.data_ptr(), rows, threads, code(x, dtype))
    addresses = _addresses(weight, scale, bias, input_scale, input_zero_point)
    record_function("linear_int8", dtype)(start + _constants(*addresses, inputs, outputs))
    return y


def _addresses(*tensors: Tensor | None) -> list[int]:
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


def prepare(tensors: Tensors) -> Prepared | None:
    """`product` for weight, scale, input_scale, input_zero_point and bias that were checked, or None where their
    dtypes or their place need a copy in every call."""
    weight, scale, input_scale, input_zero_point, bias = tensors
    if weight is None or scale is None or not is_preparable(*tensors) or weight.shape[1] > MOST_INPUTS:
        return None
    if weight.dtype != torch.int8 or any(t is not None and t.shape != weight.shape[:1] for t in (scale, bias)):
        return None
    if input_zero_point is not None and input_zero_point.dtype != torch.int32:
        return None
    if any(tensor is not None and tensor.dtype != torch.float32 for tensor in (scale, input_scale, bias)):
        return None
    outputs, inputs = weight.shape
    constants = _constants(*_addresses(weight, scale, bias, input_scale, input_zero_point), inputs, outputs)
    return Prepared("linear_int8", tensors, constants, (inputs, outputs), FLOATS, threads_from=_threads_from(weight))


def _threads_from(weight: Tensor) -> int:
    """The number of rows from which on threads are worth their start."""
    return 1 if weight.nbytes >= _LEAST_BYTES else -(-_LEAST_PRODUCTS // max(weight.nbytes, 1))
