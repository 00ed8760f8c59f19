"""RMSNorm in C (backend `native`): native.c."""

from struct import Struct

import torch
from torch import Tensor

from neural_layers.kernels.arguments import FLOATS
from neural_layers.kernels.c_library import code, plain, record_function

# The struct Norm of native.c.
_pack = Struct("7P6qdP").pack
# Rows to a task: a multiple of what hides a thread's start, and the most partial sums of the weight's gradient is 64.
_LEAST_ROWS, _MOST_BLOCKS = 16, 64


def quick(x: Tensor, weight: Tensor, eps: float) -> Tensor | None:
    """x / sqrt(mean(x²) + eps) · weight in the plain case, or None where the case is another.

    Plain are contiguous tensors that fit and that nothing watches. What is asked here stands for all the checks of the
    op, which for a single token cost more than the norm.
    """
    if not plain(x, weight) or x.dim() == 0 or weight.shape != x.shape[-1:] or eps < 0:
        return None
    if x.dtype not in FLOATS or weight.dtype not in FLOATS:
        return None
    return forward(x, weight, eps, keep_scale=False)[0]


def forward(x: Tensor, weight: Tensor, eps: float, keep_scale: bool = True) -> tuple[Tensor, Tensor | None]:
    """y, and the scale 1 / sqrt(mean(x²) + eps) of each row for the backward pass, None where it is not kept."""
    dtype = _arithmetic(x, weight)
    x, weight = x.contiguous(), weight.contiguous()
    y, scale = torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=dtype) if keep_scale else None
    addresses = x.data_ptr(), weight.data_ptr(), 0, y.data_ptr(), 0, 0, 0 if scale is None else scale.data_ptr()
    record_function("rms_norm_forward", dtype)(_pack(*addresses, *_sizes(x, weight, dtype), eps, 0))
    return y, scale


def backward(grad_y: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of x and of the weight."""
    x, weight, grad_y = x.contiguous(), weight.contiguous(), grad_y.contiguous()
    grad_x, grad_weight = torch.empty_like(x), torch.empty_like(weight)
    tensors = x, weight, grad_y, None, grad_x, grad_weight, scale
    addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
    record_function("rms_norm_backward", scale.dtype)(_pack(*addresses, *_sizes(x, weight, scale.dtype), 0.0, 0))
    return grad_x, grad_weight


def _arithmetic(x: Tensor, weight: Tensor) -> torch.dtype:
    return torch.float64 if torch.float64 in (x.dtype, weight.dtype) else torch.float32


def _sizes(x: Tensor, weight: Tensor, dtype: torch.dtype) -> tuple[int, ...]:
    """rows, width, block, dtype, weight_dtype, threads"""
    width = x.shape[-1]
    rows = x.numel() // width if width else 0
    block = max(_LEAST_ROWS, -(-rows // _MOST_BLOCKS))
    return rows, width, block, code(x, dtype), code(weight, dtype), torch.get_num_threads()
