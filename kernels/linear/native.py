"""The linear layer for few rows in C (backend `native`): native.c."""

from struct import Struct

import torch
from torch import Tensor

from neural_layers.kernels.c_library import plain, record_function

# The struct Product of native.c, and its FEW.
_pack = Struct("4P4q").pack
MOST_ROWS = 4
# A thread takes some 20 µs to start, in which a core reads this many bytes of W.
_LEAST_BYTES = 1 << 20


def quick(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor | None:
    """x Wᵀ + bias in the plain case, or None where the case is another.

    Plain are contiguous tensors of few rows that fit and that nothing watches. What is asked here stands for all the
    checks of the op, which for a single token cost more than a small layer.
    """
    if weight.ndim != 2:
        return None
    dtype, inputs = weight.dtype, weight.shape[1]
    # The size is asked first: in training it is what sends nearly all calls on, and it costs least.
    if not 0 < x.numel() <= MOST_ROWS * inputs or not plain(x, weight, bias):
        return None
    if x.dtype != dtype or x.shape[-1] != inputs or dtype not in (torch.float32, torch.float64):
        return None
    if bias is not None and (bias.dtype != dtype or bias.shape != weight.shape[:1]):
        return None
    if torch.is_autocast_enabled("cpu"):
        return None
    return linear_native(x, weight, bias)


def linear_native(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + bias for at most MOST_ROWS rows."""
    x, weight = x.contiguous(), weight.contiguous()
    bias = None if bias is None else bias.to(weight.dtype).contiguous()
    outputs, inputs = weight.shape
    y = x.new_empty(*x.shape[:-1], outputs)
    threads = torch.get_num_threads() if weight.nbytes >= _LEAST_BYTES else 1
    addresses = (x.data_ptr(), weight.data_ptr(), 0 if bias is None else bias.data_ptr(), y.data_ptr())
    record_function("linear_few", weight.dtype)(_pack(*addresses, x.numel() // inputs, inputs, outputs, threads))
    return y
