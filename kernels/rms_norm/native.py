"""RMSNorm in C (backend `native`): native.c."""

import torch
from torch import Tensor

from neural_layers.kernels import c_library
from neural_layers.kernels.arguments import accumulation_dtype

# Rows to a task: a multiple of what hides a thread's start, and the most partial sums of the weight's gradient is 64.
_LEAST_ROWS, _MOST_BLOCKS = 16, 64


def _block(rows: int) -> int:
    return max(_LEAST_ROWS, -(-rows // _MOST_BLOCKS))


def forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y, and the scale 1 / sqrt(mean(x²) + eps) of each row for the backward pass."""
    dtype, width = accumulation_dtype(x, weight), x.shape[-1]
    x, weight = x.contiguous(), weight.to(dtype).contiguous()
    y, scale = torch.empty_like(x), x.new_empty(x.shape[:-1], dtype=dtype)
    rows = scale.numel()
    run = c_library.function("rms_norm_forward", dtype)
    run(x, c_library.code(x, dtype), weight, eps, y, scale, rows, width, _block(rows), torch.get_num_threads())
    return y, scale


def backward(grad_y: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of x and of the weight."""
    dtype, width, rows = scale.dtype, x.shape[-1], scale.numel()
    x, grad_y, wide = x.contiguous(), grad_y.to(x.dtype).contiguous(), weight.to(dtype).contiguous()
    block = _block(rows)
    grad_x, grad_weight = torch.empty_like(x), x.new_empty(-(-rows // block), width, dtype=dtype)
    run = c_library.function("rms_norm_backward", dtype)
    run(
        grad_y,
        x,
        c_library.code(x, dtype),
        wide,
        scale,
        grad_x,
        grad_weight,
        rows,
        width,
        block,
        torch.get_num_threads(),
    )
    return grad_x, grad_weight.sum(dim=0).to(weight.dtype)
