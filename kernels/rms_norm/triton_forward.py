"""RMSNorm forward on the GPU (backend `triton`).

A block of rows to a program: one row where rows are long, several where they are short, so that a thread holds 16 or
more elements. The row stays in registers between the sum of squares and the product with the weight, and is read once.
Rows too long for that are read twice, in stretches.

Letters: M rows, D columns.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl
from torch import Tensor

from neural_layers.kernels.arguments import accumulation_dtype
from neural_layers.kernels.triton_support import LAUNCH, accumulator, on_device

# Elements to a program, bytes of the longest row that it holds whole (64 elements of bfloat16 to a thread), and the
# stretch of a longer one.
ELEMENTS, WHOLE_ROW_BYTES, STRETCH = 2048, 65536, 4096


@triton.jit
def _rms_norm_rows(
    x, weight, y, scale, rows, x_stride, EPS: tl.constexpr, D: tl.constexpr, ACC: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """y = x·s·weight with s = 1/√(mean x² + EPS), for ROWS whole rows.

    Reads x once and writes y once, 4 bytes an element in bfloat16 (the weight stays in the L2 cache), for 4 operations.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    exists = (row < rows)[:, None] & (column < D)[None, :]
    value = tl.load(x + row[:, None] * x_stride + column[None, :], exists, other=0.0).to(ACC)
    s = 1 / tl.sqrt(tl.sum(value * value, axis=1) / D + EPS)
    w = tl.load(weight + column, column < D, other=0.0).to(ACC)
    tl.store(y + row[:, None] * D + column[None, :], value * s[:, None] * w[None, :], exists)
    tl.store(scale + row, s, row < rows)


@triton.jit
def _rms_norm_long_row(x, weight, y, scale, x_stride, D, EPS: tl.constexpr, ACC: tl.constexpr, COLUMNS: tl.constexpr):
    """The same for one row of any length, in stretches: x is read twice, 6 bytes an element in bfloat16."""
    row = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, COLUMNS)
    squares = tl.zeros([COLUMNS], ACC)
    for start in range(0, D, COLUMNS):
        value = tl.load(x + row * x_stride + start + column, start + column < D, other=0.0).to(ACC)
        squares += value * value
    s = 1 / tl.sqrt(tl.sum(squares, axis=0) / D + EPS)
    for start in range(0, D, COLUMNS):
        exists = start + column < D
        value = tl.load(x + row * x_stride + start + column, exists, other=0.0).to(ACC)
        w = tl.load(weight + start + column, exists, other=0.0).to(ACC)
        tl.store(y + row * D + start + column, value * s * w, exists)
    tl.store(scale + row, s)


def forward(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """y, and the scale s of each row for the backward pass."""
    y = x.new_empty(x.shape)
    scale = x.new_empty(x.shape[:-1], dtype=accumulation_dtype(x, weight))
    if y.numel() == 0:
        return y, scale
    x_MD, weight = as_rows(x), weight.contiguous()
    rows, width = x_MD.shape
    acc = accumulator(x, weight)
    with on_device(x):
        if width * x.element_size() > WHOLE_ROW_BYTES:
            _rms_norm_long_row[(rows,)](
                x_MD, weight, y, scale, x_MD.stride(0), width, eps, acc, STRETCH, num_warps=8, **LAUNCH
            )
        else:
            block, columns, warps = row_block(width)
            _rms_norm_rows[(triton.cdiv(rows, block),)](
                x_MD, weight, y, scale, rows, x_MD.stride(0), eps, width, acc, block, columns, num_warps=warps, **LAUNCH
            )
    return y, scale


def as_rows(x: Tensor) -> Tensor:
    """x as (M, D) with neighbouring columns, copied only where its strides leave no other way."""
    x_MD = x.reshape(-1, x.shape[-1])
    return x_MD if x_MD.stride(-1) == 1 else x_MD.contiguous()


def row_block(width: int) -> tuple[int, int, int]:
    """Rows and columns of a block, and its warps: 16 elements to a thread, more where rows are longer than 8192."""
    columns = triton.next_power_of_2(width)
    rows = max(1, min(32, ELEMENTS // columns))
    warps = max(4, min(16, rows * columns // 512))
    return rows, columns, warps
