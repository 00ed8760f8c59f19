"""RMSNorm backward on the GPU (backend `triton`).

With x̂ = x·s, s the scale of the row, and d = grad_y·weight:

    grad_x = s·(d − x̂·mean(d·x̂));  grad_weight = Σ over rows of grad_y·x̂

The weight's gradient is summed without atomics: as many programs as the GPU holds at once walk over the rows, each
keeps its partial sum in registers to its end, and torch adds the partial sums. The same bits come out of every run.

Letters: M rows, D columns, P programs.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from neural_layers.kernels.rms_norm import triton_forward
from neural_layers.kernels.triton_support import LAUNCH, accumulator, multiprocessors, on_device

# Bytes of accumulators of the longest row that a program holds whole, and the tile of those that are longer.
WHOLE_ROW_BYTES, TILE_ROWS, TILE_COLUMNS = 32768, 32, 64


@triton.jit
def _rms_norm_rows_backward(
    grad_y, x, weight, scale, grad_x, partial, rows, y_stride, x_stride,
    D: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """grad_x for every P-th block of ROWS whole rows, and this program's share of grad_weight.

    Reads grad_y and x and writes grad_x, 6 bytes an element in bfloat16, for 9 operations; P·D accumulators besides.
    """
    column = tl.arange(0, COLUMNS)
    w = tl.load(weight + column, column < D, other=0.0).to(ACC)[None, :]
    total = tl.zeros([ROWS, COLUMNS], ACC)
    for block in range(tl.program_id(0).to(tl.int64), tl.cdiv(rows, ROWS), tl.num_programs(0)):
        row = block * ROWS + tl.arange(0, ROWS)
        exists = (row < rows)[:, None] & (column < D)[None, :]
        value = tl.load(x + row[:, None] * x_stride + column[None, :], exists, other=0.0).to(ACC)
        g = tl.load(grad_y + row[:, None] * y_stride + column[None, :], exists, other=0.0).to(ACC)
        s = tl.load(scale + row, row < rows, other=0.0)[:, None]
        normed = value * s
        total += g * normed
        d = g * w
        mean = tl.sum(d * normed, axis=1)[:, None] / D
        tl.store(grad_x + row[:, None] * D + column[None, :], s * (d - normed * mean), exists)
    tl.store(partial + tl.program_id(0).to(tl.int64) * D + column, tl.sum(total, axis=0), column < D)


@triton.jit
def _rms_norm_long_row_mean(
    grad_y, x, weight, scale, mean, y_stride, x_stride, D, ACC: tl.constexpr, COLUMNS: tl.constexpr
):
    """mean(d·x̂) of one row of any length. Reads grad_y and x: 4 bytes an element in bfloat16."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    total = tl.zeros([COLUMNS], ACC)
    for start in range(0, D, COLUMNS):
        exists = start + column < D
        value = tl.load(x + row * x_stride + start + column, exists, other=0.0).to(ACC)
        g = tl.load(grad_y + row * y_stride + start + column, exists, other=0.0).to(ACC)
        w = tl.load(weight + start + column, exists, other=0.0).to(ACC)
        total += g * w * value
    tl.store(mean + row, tl.sum(total, axis=0) * tl.load(scale + row) / D)


@triton.jit
def _rms_norm_long_row_backward(
    grad_y, x, weight, scale, mean, grad_x, partial, rows, y_stride, x_stride, D,
    ACC: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """grad_x and the share of grad_weight of a strip of columns, over every P-th block of rows, given mean(d·x̂).

    Reads grad_y and x once more: 10 bytes an element in bfloat16 with the kernel before.
    """
    column = tl.program_id(0) * COLUMNS + tl.arange(0, COLUMNS)
    w = tl.load(weight + column, column < D, other=0.0).to(ACC)[None, :]
    total = tl.zeros([ROWS, COLUMNS], ACC)
    for block in range(tl.program_id(1).to(tl.int64), tl.cdiv(rows, ROWS), tl.num_programs(1)):
        row = block * ROWS + tl.arange(0, ROWS)
        exists = (row < rows)[:, None] & (column < D)[None, :]
        value = tl.load(x + row[:, None] * x_stride + column[None, :], exists, other=0.0).to(ACC)
        g = tl.load(grad_y + row[:, None] * y_stride + column[None, :], exists, other=0.0).to(ACC)
        s = tl.load(scale + row, row < rows, other=0.0)[:, None]
        m = tl.load(mean + row, row < rows, other=0.0)[:, None]
        normed = value * s
        total += g * normed
        tl.store(grad_x + row[:, None] * D + column[None, :], s * (g * w - normed * m), exists)
    tl.store(partial + tl.program_id(1).to(tl.int64) * D + column, tl.sum(total, axis=0), column < D)


def backward(grad_y: Tensor, x: Tensor, weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """The gradients of x and of the weight."""
    grad_x = x.new_empty(x.shape)
    if grad_x.numel() == 0:
        return grad_x, torch.zeros_like(weight, memory_format=torch.contiguous_format)
    y_MD, x_MD = triton_forward.as_rows(grad_y), triton_forward.as_rows(x)
    weight, scale = weight.contiguous(), scale.contiguous()
    launch = _whole_rows if x.shape[-1] * scale.element_size() <= WHOLE_ROW_BYTES else _long_rows
    with on_device(x):
        partial_PD = launch(y_MD, x_MD, weight, scale, grad_x)
    return grad_x, partial_PD.sum(dim=0).to(weight.dtype)


def _whole_rows(y_MD: Tensor, x_MD: Tensor, weight: Tensor, scale: Tensor, grad_x: Tensor) -> Tensor:
    rows, width = x_MD.shape
    columns = triton.next_power_of_2(width)
    block = max(1, min(32, 2048 // columns))
    # 8 elements to a thread: with x, grad_y, weight and sum of each in 64 registers, 32 warps fit a multiprocessor.
    warps = max(4, min(16, block * columns // 256))
    resident = (32 if block * columns <= 256 * warps else 16) // warps
    programs = min(triton.cdiv(rows, block), multiprocessors(x_MD.device) * resident)
    partial_PD = scale.new_empty(programs, width)
    _rms_norm_rows_backward[(programs,)](
        y_MD, x_MD, weight, scale, grad_x, partial_PD, rows, y_MD.stride(0), x_MD.stride(0),
        width, accumulator(scale), block, columns,
        num_warps=warps, **LAUNCH,
    )  # fmt: skip
    return partial_PD


def _long_rows(y_MD: Tensor, x_MD: Tensor, weight: Tensor, scale: Tensor, grad_x: Tensor) -> Tensor:
    rows, width = x_MD.shape
    acc, mean_M = accumulator(scale), torch.empty_like(scale)
    _rms_norm_long_row_mean[(rows,)](
        y_MD, x_MD, weight, scale, mean_M, y_MD.stride(0), x_MD.stride(0), width, acc, triton_forward.STRETCH,
        num_warps=8, **LAUNCH,
    )  # fmt: skip
    strips = triton.cdiv(width, TILE_COLUMNS)
    programs = min(triton.cdiv(rows, TILE_ROWS), triton.cdiv(multiprocessors(x_MD.device) * 8, strips))
    partial_PD = scale.new_empty(programs, width)
    _rms_norm_long_row_backward[(strips, programs)](
        y_MD, x_MD, weight, scale, mean_M, grad_x, partial_PD, rows, y_MD.stride(0), x_MD.stride(0), width,
        acc, TILE_ROWS, TILE_COLUMNS,
        num_warps=4, **LAUNCH,
    )  # fmt: skip
    return partial_PD
