"""The 4-bit linear layer on the GPU (backend `triton`), which reads the weight in its 4 bits.

Up to `FEW` rows of x, as in decoding, are bound by the memory that holds the weight: each warp sums over a stretch of
one output's codes, which it loads once for all rows. More rows make matrix products of tiles, of which the weight's is
unpacked in registers. From `COPIED` rows on, which would unpack each tile for many blocks of rows again, a copy of the
weight is made for one product of torch: 4 bytes a weight to write and read it cost less than that.

Letters: M rows of x, N columns of y, K the dimension that is summed over; in the first kernel J stretches of the codes.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment, var-annotated"

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from neural_layers.kernels.arguments import accumulation_dtype
from neural_layers.kernels.dequantize_4bit.triton_kernels import (
    EXACT,
    dequantize,
    load_absmax,
    load_tile,
    nesting,
    pointers,
    span,
    values_of_pairs,
)
from neural_layers.kernels.four_bit import Quantized4bit
from neural_layers.kernels.triton_support import LAUNCH, accumulator, multiprocessors, on_device

FEW, COPIED = 4, 1024
# Of the kernel for few rows: outputs of a program, weights of each in a step, the shortest stretch with one scale.
OUTPUTS, STEP, SHORTEST = 4, 1024, 16


@triton.jit
def _few_rows(
    x, packed, absmax, table, map, nested, offset, bias, y, row_bytes, outputs,
    M: tl.constexpr, N: tl.constexpr, J: tl.constexpr, SPAN: tl.constexpr, SIZE: tl.constexpr,
    NESTED: tl.constexpr, NESTED_SIZE: tl.constexpr, HAS_BIAS: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """y_mn = Σ_j absmax_nj Σ_k value_njk · x_mjk + bias_n, for all M rows and N outputs.

    Reads the weight once, 0.56 bytes each in blocks of 64, and x, which stays in the cache, for every program; for
    about 8 + 2·M operations a weight.
    """
    table = tl.load(table + tl.arange(0, 16))
    n = tl.program_id(0).to(tl.int64) * N + tl.arange(0, N)
    j = tl.arange(0, J)
    half, whole = tl.arange(0, SPAN // 2), tl.arange(0, SPAN)
    sums = ()
    for _ in tl.static_range(M):
        sums = sums + (tl.zeros([N, J], ACC),)
    for first in range(0, row_bytes, J * (SPAN // 2)):
        start_J = first + j * (SPAN // 2)
        exists_NJ = (n < outputs)[:, None] & (start_J < row_bytes)[None, :]
        byte = (n * row_bytes)[:, None, None] + start_J[None, :, None] + half[None, None, :]
        values = values_of_pairs(tl.load(packed + byte, exists_NJ[:, :, None], other=0), table, ACC)
        block = ((n * row_bytes)[:, None] + start_J[None, :]) // (SIZE // 2)
        scale = load_absmax(absmax, nested, offset, map, block, exists_NJ, NESTED, NESTED_SIZE).to(ACC)
        added = ()
        for m in tl.static_range(M):
            at = x + m * (row_bytes * 2) + 2 * start_J[:, None] + whole[None, :]
            x_JK = tl.load(at, (start_J < row_bytes)[:, None], other=0.0).to(ACC)
            added = added + (sums[m] + tl.sum(values * x_JK[None, :, :], axis=2) * scale,)
        sums = added
    for m in tl.static_range(M):
        total = tl.sum(sums[m], axis=1)
        if HAS_BIAS:
            total += tl.load(bias + n, n < outputs, other=0.0).to(ACC)
        tl.store(y + m * outputs + n, total, n < outputs)


@triton.jit
def _many_rows(
    x, packed, absmax, table, map, nested, offset, bias, y, rows, outputs, inputs, row_bytes,
    M: tl.constexpr, N: tl.constexpr, K: tl.constexpr, SPAN: tl.constexpr, SIZE: tl.constexpr,
    NESTED: tl.constexpr, NESTED_SIZE: tl.constexpr, HAS_BIAS: tl.constexpr, TRANSPOSED: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr,
):  # fmt: skip
    """A tile (M, N) of y = x Wᵀ + bias, or of x W where TRANSPOSED.

    Reads 0.56 bytes a weight in blocks of 64 for each M rows, and x for each N columns, most of them from the L2 cache;
    for 2·M operations a weight, and about 8 to unpack it.
    """
    table = tl.load(table + tl.arange(0, 16))
    # Programs that share a tile of the weight follow each other.
    blocks = tl.cdiv(rows, M)
    program = tl.program_id(0).to(tl.int64)
    m = program % blocks * M + tl.arange(0, M)
    first_n = program // blocks * N
    n = first_n + tl.arange(0, N)
    width = outputs if TRANSPOSED else inputs
    columns = inputs if TRANSPOSED else outputs
    total = tl.zeros([M, N], ACC)
    for first in range(0, width, K):
        k = first + tl.arange(0, K)
        exists = (m < rows)[:, None] & (k < width)[None, :]
        x_MK = tl.load(x + m[:, None] * width + k[None, :], exists, other=0.0)
        if TRANSPOSED:
            w_KN = load_tile(
                packed, absmax, table, map, nested, offset, k.to(tl.int64), first_n, outputs, inputs, row_bytes,
                K, N, SPAN, SIZE, NESTED, NESTED_SIZE, ACC,
            )  # fmt: skip
        else:
            w_KN = load_tile(
                packed, absmax, table, map, nested, offset, n, first, outputs, inputs, row_bytes,
                N, K, SPAN, SIZE, NESTED, NESTED_SIZE, ACC,
            ).trans()  # fmt: skip
        total = tl.dot(x_MK, w_KN.to(DOT), total, input_precision="ieee", out_dtype=ACC)
    if HAS_BIAS:
        total += tl.load(bias + n, n < columns, other=0.0).to(ACC)[None, :]
    tl.store(y + m[:, None] * columns + n[None, :], total, (m < rows)[:, None] & (n < columns)[None, :])


def product(x: Tensor, quantized: Quantized4bit, bias: Tensor | None, transposed: bool) -> Tensor:
    """x Wᵀ + bias, or x W where transposed; sums are kept in float32, in float64 where x is float64."""
    outputs, inputs = quantized.shape
    y = x.new_empty(*x.shape[:-1], inputs if transposed else outputs)
    if not y.numel() or not x.shape[-1]:
        return y.zero_() if bias is None else y.copy_(bias.expand(y.shape))
    x = x.contiguous()
    rows = x.numel() // x.shape[-1]
    if rows >= COPIED:
        return _of_copy(x, quantized, bias, transposed)
    bias = None if bias is None else bias.contiguous()
    # In float64 the scale of a nested block shows how it was rounded.
    launch = EXACT if x.dtype == torch.float64 else LAUNCH
    stretch = span(quantized, 64)
    tensors, constants = (x, *pointers(quantized), bias, y), (quantized.block_size, *nesting(quantized))
    with on_device(x):
        if rows <= FEW and stretch >= SHORTEST and not transposed:
            _few_rows[(triton.cdiv(outputs, OUTPUTS),)](
                *tensors, inputs // 2, outputs, rows, OUTPUTS, STEP // stretch, stretch, *constants,
                bias is not None, accumulator(x), num_warps=4, **launch,
            )  # fmt: skip
        else:
            tile = _tile(x, rows, y.shape[-1], ragged=stretch < SHORTEST, transposed=transposed)
            stretch = span(quantized, tile.n if transposed else tile.k)
            _many_rows[(triton.cdiv(rows, tile.m) * triton.cdiv(y.shape[-1], tile.n),)](
                *tensors, rows, outputs, inputs, inputs // 2, tile.m, tile.n, tile.k, stretch, *constants,
                bias is not None, transposed, accumulator(x), _TRITON[x.dtype],
                num_warps=tile.warps, num_stages=tile.stages, **launch,
            )  # fmt: skip
    return y


_TRITON = {
    torch.float64: tl.float64,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


@dataclass(frozen=True)
class _Tile:
    """The sides of a matrix product of `_many_rows`, and how it runs."""

    m: int
    n: int
    k: int
    warps: int
    stages: int = 2


def _tile(x: Tensor, rows: int, columns: int, *, ragged: bool, transposed: bool) -> _Tile:
    """The tile for these rows; a ragged weight, with scales for a few weights each, leaves fewer registers."""
    if x.dtype == torch.float64:
        return _Tile(16, 32, 32, 4)
    m = max(16, min(triton.next_power_of_2(rows), 128))
    if x.dtype == torch.float32:
        return _Tile(min(m, 64), 64, 16, 4 if m == 16 else 8)
    if ragged:
        return _Tile(min(m, 64), 64, 32, 8)
    if m >= 64:
        return _Tile(m, 128, 64 if m == 64 else 32, 8)
    # Bound by the memory of the weight: programs enough for every multiprocessor, and several loads of each on the way.
    if transposed:
        # 16 bytes of each row: the rest of the 32 that the memory sends waits in the L2 cache for the next program.
        return _Tile(m, 32, 128, 4, 3)
    narrow = columns < 64 * multiprocessors(x.device)
    return _Tile(m, 16 if narrow else 32, 256, 4, 3)


def _of_copy(x: Tensor, quantized: Quantized4bit, bias: Tensor | None, transposed: bool) -> Tensor:
    """The product through a copy of the weight in the dtype of x, which lives for the call."""
    weight = dequantize(quantized, x.dtype)
    # Inside autocast the product would otherwise run in, and return, another dtype.
    with torch.autocast(x.device.type, enabled=False):
        if bias is not None and bias.dtype == x.dtype:
            return torch.nn.functional.linear(x, weight, bias)
        y = x @ (weight if transposed else weight.T)
        return y if bias is None else (y.to(accumulation_dtype(x)) + bias).to(x.dtype)
