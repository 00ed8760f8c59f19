"""The affine 4-bit linear layer in C (backend `native`): native.c for a handful of rows.

More rows go through a restored copy of the weight, which costs less than a hundredth of a product of 100 rows.
"""

from struct import Struct

import torch
from torch import Tensor

from neural_layers.kernels.arguments import accumulation_dtype
from neural_layers.kernels.c_library import code, record_function
from neural_layers.kernels.dequantize_int4.native import restore
from neural_layers.kernels.int4 import QuantizedInt4
from neural_layers.kernels.prepared import FLOATS, Prepared, head, is_preparable

# The struct Call of native.c after its head, and its MOST_ROWS.
_constants = Struct("4P3q").pack
MOST_ROWS = 16
# A thread takes some 20 µs to start, in which a core reads this many bytes of codes.
_LEAST_BYTES = 1 << 19


def product(x: Tensor, quantized: QuantizedInt4, bias: Tensor | None) -> Tensor:
    """x Wᵀ + bias."""
    outputs, inputs = quantized.shape
    rows, dtype = x.shape[:-1].numel(), accumulation_dtype(x)
    if rows > MOST_ROWS:
        return _of_copy(x, quantized, bias)
    bits = (quantized.packed.contiguous(), quantized.scale.contiguous(), quantized.zero_point.contiguous())
    x, bias = x.contiguous(), None if bias is None else bias.to(dtype).contiguous()
    y = x.new_empty(*x.shape[:-1], outputs)
    threads = torch.get_num_threads() if quantized.packed.nbytes >= _LEAST_BYTES else 1
    start = head(x.data_ptr(), y.data_ptr(), rows, threads, code(x, dtype))
    addresses = [0 if tensor is None else tensor.data_ptr() for tensor in (*bits, bias)]
    constants = _constants(*addresses, inputs, outputs, quantized.block_size)
    record_function("linear_int4", dtype)(start + constants)
    return y


def prepare(quantized: QuantizedInt4, bias: Tensor | None) -> Prepared | None:
    """`product` of few rows for a weight and a bias that were checked, or None where their dtypes or their place need a
    copy in every call."""
    outputs, inputs = quantized.shape
    tensors = (quantized.packed, quantized.scale, quantized.zero_point, bias)
    if not is_preparable(*tensors) or (bias is not None and bias.dtype != torch.float32):
        return None
    addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    constants = _constants(*addresses, inputs, outputs, quantized.block_size)
    return Prepared(
        "linear_int4",
        tensors,
        constants,
        (inputs, outputs),
        FLOATS,
        most_rows=MOST_ROWS,
        threads_from=1 if quantized.packed.nbytes >= _LEAST_BYTES else MOST_ROWS + 1,
    )


def _of_copy(x: Tensor, quantized: QuantizedInt4, bias: Tensor | None) -> Tensor:
    weight = restore(quantized, x.dtype)
    # Inside autocast the product would otherwise run in, and return, another dtype.
    with torch.autocast("cpu", enabled=False):
        if bias is None or bias.dtype == x.dtype:
            return torch.nn.functional.linear(x, weight, bias)
        return ((x @ weight.T).to(accumulation_dtype(x)) + bias).to(x.dtype)
