"""4-bit weights on the GPU (backend `triton`): how a kernel reads one, and the kernel that writes it out.

A code's value is gathered from a table of 16 numbers in shared memory: a load for each weight, where choosing among 16
constants would take 15 operations. A byte is loaded once for its two codes, and a scale once for its weights in a tile.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from functools import cache
from math import gcd
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from neural_layers.kernels.four_bit import CODES, DYNAMIC_MAP, NESTED_BLOCK, Quantized4bit
from neural_layers.kernels.triton_support import LAUNCH, on_device

# Weights of a program, 16 bytes of codes for each thread.
BLOCK, WARPS = 4096, 4
# In launches that need float32 rounded as torch rounds it, the scale of a nested block is no fused multiply-add.
EXACT = LAUNCH | {"enable_fp_fusion": False}


@triton.jit
def load_absmax(absmax, nested, offset, map, block, exists, NESTED: tl.constexpr, NESTED_SIZE: tl.constexpr):
    """The absmax of these blocks, in float32, decoded where they are double-quantized."""
    if NESTED:
        code = tl.load(absmax + block, exists, other=0).to(tl.int32)
        scale = tl.load(nested + block // NESTED_SIZE, exists, other=0.0)
        value = tl.load(map + code) * scale + tl.load(offset)
    else:
        value = tl.load(absmax + block, exists, other=0.0)
    return value


@triton.jit
def values_of(codes, table, ACC: tl.constexpr):
    """The values of codes, by a table (16,) in registers."""
    flat = tl.reshape(codes, [codes.numel])
    return tl.reshape(tl.gather(table, flat, 0), codes.shape).to(ACC)


@triton.jit
def values_of_pairs(bytes, table, ACC: tl.constexpr):
    """The values of the two codes in each of these bytes, twice as many in the last dimension."""
    codes = bytes.to(tl.int32)
    return values_of(tl.interleave(codes >> 4, codes & 15), table, ACC)


@triton.jit
def load_tile(
    packed, absmax, table, map, nested, offset, row, first, rows, columns, row_bytes,
    R: tl.constexpr, C: tl.constexpr, SPAN: tl.constexpr, SIZE: tl.constexpr,
    NESTED: tl.constexpr, NESTED_SIZE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """W[row, first … first + C) of a weight (rows, columns), as (R, C); `row` is 64-bit, and first a multiple of C.

    A scale is loaded once for each SPAN weights. row_bytes is columns // 2: of an argument Triton knows by how much it
    can be divided, and with it how many bytes it can load at once.
    """
    start = first + tl.arange(0, C // SPAN) * SPAN
    exists = (row < rows)[:, None] & (start < columns)[None, :]
    i = row[:, None] * columns + start[None, :]
    scale = load_absmax(absmax, nested, offset, map, i // SIZE, exists, NESTED, NESTED_SIZE).to(ACC)
    if SPAN == 1:
        # Rows of an odd length: a byte may belong to two of them.
        bytes = tl.load(packed + i // 2, exists, other=0).to(tl.int32)
        weight = values_of((bytes >> (4 - 4 * (i % 2)).to(tl.int32)) & 15, table, ACC) * scale
    else:
        half = first // 2 + tl.arange(0, C // 2)
        exists = (row < rows)[:, None] & (half < row_bytes)[None, :]
        bytes = tl.load(packed + row[:, None] * row_bytes + half[None, :], exists, other=0)
        values = values_of_pairs(bytes, table, ACC)
        weight = tl.reshape(tl.reshape(values, [R, C // SPAN, SPAN]) * scale[:, :, None], [R, C])
    return weight


@triton.jit
def _dequantize(
    packed, absmax, table, map, nested, offset, out, bytes, count,
    SIZE: tl.constexpr, BLOCK: tl.constexpr, SPAN: tl.constexpr,
    NESTED: tl.constexpr, NESTED_SIZE: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """w_i = value of code_i · absmax of its block, BLOCK of them.

    Reads 4 bits a weight and 4 bytes a block (1 where double-quantized), writes the weight: 2.6 bytes in bfloat16 and
    blocks of 64, for about 8 operations.
    """
    table = tl.load(table + tl.arange(0, 16))
    first = tl.program_id(0).to(tl.int64) * BLOCK
    byte = first // 2 + tl.arange(0, BLOCK // 2)
    values = values_of_pairs(tl.load(packed + byte, byte < bytes, other=0), table, ACC)
    start = first + tl.arange(0, BLOCK // SPAN) * SPAN
    scale = load_absmax(absmax, nested, offset, map, start // SIZE, start < count, NESTED, NESTED_SIZE).to(ACC)
    weight = tl.reshape(tl.reshape(values, [BLOCK // SPAN, SPAN]) * scale[:, None], [BLOCK])
    i = first + tl.arange(0, BLOCK)
    tl.store(out + i, weight, i < count)


def dequantize(quantized: Quantized4bit, dtype: torch.dtype | None = None) -> Tensor:
    """The weight, in a dtype other than its own where one is given."""
    weight = quantized.packed.new_empty(quantized.shape, dtype=dtype or quantized.dtype)
    count, size = weight.numel(), quantized.block_size
    if count:
        acc = tl.float64 if weight.dtype == torch.float64 else tl.float32
        with on_device(weight):
            _dequantize[(triton.cdiv(count, BLOCK),)](
                *pointers(quantized), weight, quantized.packed.numel(), count,
                size, BLOCK, min(size, BLOCK), *nesting(quantized), acc,
                num_warps=2 * WARPS if acc == tl.float64 else WARPS, **EXACT,
            )  # fmt: skip
    return weight


def pointers(quantized: Quantized4bit) -> tuple[Tensor | None, ...]:
    """The record as the kernels take it: packed, absmax, table, map, nested, offset."""
    q = quantized
    table, map = _tables(q.quant_type, q.packed.device)
    nested = None if q.nested_absmax is None else q.nested_absmax.contiguous()
    return q.packed.contiguous(), q.absmax.contiguous(), table, map, nested, q.offset


def nesting(quantized: Quantized4bit) -> tuple[Any, ...]:
    """Whether a record is double-quantized, and the size of its nested blocks, as constants of a kernel."""
    return quantized.nested_absmax is not None, NESTED_BLOCK


def span(quantized: Quantized4bit, most: int) -> int:
    """How many neighbouring weights, at most, surely have one scale: rows need not be made of whole blocks."""
    return gcd(quantized.shape[1], quantized.block_size, most)


@cache
def _tables(quant_type: str, device: torch.device) -> tuple[Tensor, Tensor]:
    """The values of the codes and of the nested codes, once for each device."""
    table, map = (torch.tensor(v, dtype=torch.float32, device=device) for v in (CODES[quant_type], DYNAMIC_MAP))
    return table, map
