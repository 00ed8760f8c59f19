"""Attention on the GPU (backend `triton`), forward: an online softmax over blocks of keys (FlashAttention-2,
arXiv 2307.08691).

The query heads that share keys are taken together: row r of a pair (b, g) is query r // M, head g · M + r % M, so that
a program reads keys and values once for all of them, and a decoding step fills a matrix too. What causal, window and
documents let a query see is one interval of keys, and what sees a key one interval of queries. A program visits only
the blocks that some of its rows see, and compares positions only in those that not all of them see.

Letters: B batch, T queries, S keys, H query heads, G key/value heads, M = H / G, K head width, V value width; in
kernels R rows and S keys of a block.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

import math
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from neural_layers.kernels.arguments import accumulation_dtype, document_numbers
from neural_layers.kernels.flash_attention.triton_blocks import LEAST, blocks_for
from neural_layers.kernels.triton_support import LAUNCH, accumulator, contiguous, on_device, rows

# Scores are kept in units of ln 2: `tl.exp2` is one instruction.
LOG2_E = math.log2(math.e)


@triton.jit
def dot(left, right, total, PRECISION: tl.constexpr):
    """total + left @ right."""
    return tl.dot(left, right, total, input_precision=PRECISION, out_dtype=total.dtype)


@triton.jit
def load_rows(at, exists, column, WIDTH: tl.constexpr, PADDED: tl.constexpr, CHECKED: tl.constexpr):
    """A matrix (rows, PADDED) with 0 in columns that only fill up a power of two and, with CHECKED, in absent rows."""
    if WIDTH == PADDED:
        if CHECKED:
            return tl.load(at, exists[:, None], other=0.0)
        return tl.load(at)
    mask = (column < WIDTH)[None, :]
    if CHECKED:
        mask = mask & exists[:, None]
    return tl.load(at, mask, other=0.0)


@triton.jit
def products(
    left, right, left_at, right_at, right_exists, total, WIDTH: tl.constexpr, CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """total + left @ rightᵀ, of matrices with these rows, which lie at these addresses.

    With fewer columns than there are, CHUNK of them at a time, read again from memory: without matrix units a thread
    holds all columns of its rows in registers.
    """
    PADDED: tl.constexpr = left.shape[1]
    if CHUNK >= PADDED:
        total = dot(left, tl.trans(right), total, PRECISION)
    else:
        for first in range(0, PADDED, CHUNK):
            column = first + tl.arange(0, CHUNK)
            some = load_rows(left_at + column[None, :], right_exists, column, WIDTH, PADDED, False)
            others = load_rows(right_at + column[None, :], right_exists, column, WIDTH, PADDED, True)
            total = dot(some, tl.trans(others), total, PRECISION)
    return total


@triton.jit
def place_rows(first, T, M: tl.constexpr, R: tl.constexpr):
    """Rows first … first + R − 1 of a pair: their numbers, which of them exist, query and head of each."""
    r = first + tl.arange(0, R)
    inside = tl.minimum(r, T * M - 1)
    t = inside // M
    return r, r < T * M, t, inside - t * M


@triton.jit
def row_offsets(t, m, x_T, x_H):
    """Offsets of rows from the first of their pair, 64-bit."""
    return t.to(tl.int64)[:, None] * x_T + m.to(tl.int64)[:, None] * x_H


@triton.jit
def seen_keys(i, starts, ends, b, S, window, CAUSAL: tl.constexpr):
    """The first key that the query at each position sees, and the one after the last."""
    low = tl.zeros_like(i)
    high = tl.zeros_like(i) + S
    if window is not None:
        low = tl.maximum(i - window + 1, 0)
        high = tl.minimum(i + window, S)
    if CAUSAL:
        high = tl.minimum(i + 1, high)
    if starts is not None:
        low = tl.maximum(low, tl.load(starts + b * S + i))
        high = tl.minimum(high, tl.load(ends + b * S + i))
    return low, high


@triton.jit
def phases(low, high, SIZE: tl.constexpr):
    """Borders of three phases of blocks of SIZE, which cover all that lies between some low and its high: in the
    second are those that lie between every low and its high."""
    begin = tl.min(low, axis=0) // SIZE * SIZE
    full_begin = (tl.max(low, axis=0) + SIZE - 1) // SIZE * SIZE
    full_end = tl.maximum(tl.min(high, axis=0), 0) // SIZE * SIZE
    none = full_end <= full_begin
    return begin, tl.where(none, begin, full_begin), tl.where(none, begin, full_end), tl.max(high, axis=0)


@triton.jit
def capped(x, EXACT: tl.constexpr):
    """tanh(x) and its slope 1 − tanh², which keeps its digits where tanh saturates."""
    a = tl.abs(x)
    r = 1 / (1 + tl.exp2(a * 2.8853900817779268))  # 2 · log2 e
    y = 1 - 2 * r
    y = tl.where(x < 0, -y, y)
    if EXACT:
        # The difference above leaves few digits near 0; this is the polynomial of Cephes.
        z = x * x
        p = z * -5.70498872745e-3 + 2.06390887954e-2
        p = p * z - 5.37397155531e-2
        p = p * z + 1.33314422036e-1
        p = p * z - 3.33332819422e-1
        y = tl.where(a < 0.625, p * z * x + x, y)
    return y, 4 * r * (1 - r)


@triton.jit
def scores(product, i, key, slope, INNER: tl.constexpr, CAP: tl.constexpr, EXACT: tl.constexpr):
    """Scores in units of ln 2 from products of queries and keys, and the cap's slope where there is a cap.

    i, key: positions; slope: in units of ln 2, or None; all of a shape that broadcasts to that of `product`
    """
    score = product * INNER
    cap_slope = score
    if CAP is not None:
        score, cap_slope = capped(score, EXACT)
        score = score * CAP
    if slope is not None:
        # Positions are converted before they are subtracted: there are fewer of them than of distances.
        score -= tl.abs(i.to(product.dtype) - key.to(product.dtype)) * slope
    return score, cap_slope


@triton.jit
def _attend_keys(
    state, q_RK, q_at, rows_of, keys_of, slope, mask, first, last, S, INNER: tl.constexpr, CAP: tl.constexpr,
    EXACT: tl.constexpr, K: tl.constexpr, V: tl.constexpr, SIZE: tl.constexpr, EDGE: tl.constexpr, CHUNK: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The state of the softmax after keys first … last; with EDGE some of them are hidden from some rows."""
    maximum, total, out_RV = state
    i, low, high = rows_of
    k, v, k_S, v_S, k_tile, v_tile = keys_of
    kk = tl.arange(0, q_RK.shape[1])
    vv = tl.arange(0, out_RV.shape[1])
    for s in range(first, last, SIZE):
        key = s + tl.arange(0, SIZE)
        exists = key < S
        k_at = k + s * k_S + k_tile
        k_SK = load_rows(k_at + kk[None, :], exists, kk, K, q_RK.shape[1], EDGE)
        product = tl.zeros([q_RK.shape[0], SIZE], out_RV.dtype)
        product = products(q_RK, k_SK, q_at, k_at, exists, product, K, CHUNK, PRECISION)
        score, _ = scores(product, i[:, None], key[None, :], slope, INNER, CAP, EXACT)
        if EDGE:
            sees = (low[:, None] <= key[None, :]) & (key[None, :] < high[:, None])
            if mask is not None:
                sees = sees & (tl.load(mask + key, exists, other=0) != 0)[None, :]
            score = tl.where(sees, score, float("-inf"))
        raised = tl.maximum(maximum, tl.max(score, axis=1))
        # Where no key was seen yet, −inf − (−inf) would be NaN.
        shift = tl.where(raised == float("-inf"), 0.0, raised)
        weight = tl.exp2(score - shift[:, None])
        shrink = tl.exp2(maximum - shift)
        total = total * shrink + tl.sum(weight, axis=1)
        v_SV = load_rows(v + s * v_S + v_tile + vv[None, :], exists, vv, V, out_RV.shape[1], EDGE)
        out_RV = dot(weight.to(v_SV.dtype), v_SV, out_RV * shrink[:, None], PRECISION)
        maximum = raised
    return maximum, total, out_RV


@triton.jit
def _attend(
    q, k, v, slopes, sinks, mask, starts, ends, out, lse, T, S, G, window, blocks,
    q_B, q_T, q_H, k_B, k_S, k_G, v_B, v_S, v_G,
    CAUSAL: tl.constexpr, INNER: tl.constexpr, CAP: tl.constexpr, EXACT: tl.constexpr, K: tl.constexpr,
    V: tl.constexpr, M: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    FIRST: tl.constexpr, R: tl.constexpr, SIZE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """The output and the log-sum-exp of R rows of a pair (b, g).

    Reads q and writes out once, 2·(K + V) bytes a row in bfloat16; keys and values are read once for each block of
    rows that sees them, from the L2 cache but for the first. For each pair of a row and a key that it sees it takes
    2·(K + V) operations in matrix products, an exponential and about 6 others; 5 more in a block with an edge, 3 for
    ALiBi, and 8 for softcap, an exponential among them.
    """
    program = tl.program_id(0).to(tl.int64)
    pair = program // blocks
    b = pair // G
    g = pair - b * G
    # Under causal the last rows take longest: they start first.
    r, exists, t, m = place_rows((blocks - 1 - (program - pair * blocks)).to(tl.int32) * R, T, M, R)
    i = t + (S - T)
    kk = tl.arange(0, KP)
    vv = tl.arange(0, VP)
    q_at = q + b * q_B + g * M * q_H + row_offsets(t, m, q_T, q_H)
    q_RK = load_rows(q_at + kk[None, :], exists, kk, K, KP, False)
    maximum = tl.full([R], float("-inf"), ACC)
    slope = None
    if sinks is not None:
        maximum = tl.load(sinks + g * M + m).to(ACC) * 1.4426950408889634
    if slopes is not None:
        slope = (tl.load(slopes + g * M + m).to(ACC) * 1.4426950408889634)[:, None]
    if mask is not None:
        mask += b * S
    k_step = tl.zeros([], tl.int64) + k_S
    v_step = tl.zeros([], tl.int64) + v_S
    n = tl.arange(0, SIZE)[:, None]
    low, high = seen_keys(i, starts, ends, b, S, window, CAUSAL)
    # Tuples cannot hold None, which slope and mask may be.
    rows_of = (i, low, high)
    keys_of = (k + b * k_B + g * k_G, v + b * v_B + g * v_G, k_step, v_step, n * k_step, n * v_step)
    state = (maximum, tl.where(maximum == float("-inf"), 0.0, 1.0).to(ACC), tl.zeros([R, VP], ACC))
    border = phases(low, high, SIZE)
    for phase in tl.static_range(FIRST, 3):
        state = _attend_keys(
            state, q_RK, q_at, rows_of, keys_of, slope, mask, border[phase] if FIRST < 2 else border[0],
            border[phase + 1], S, INNER, CAP, EXACT, K, V, SIZE, phase != 1, CHUNK, PRECISION,
        )  # fmt: skip
    maximum, total, out_RV = state
    divisor = tl.where(total == 0, 1.0, total)
    at = out + ((b * T + t) * G * M + g * M + m)[:, None] * V + vv[None, :]
    tl.store(at, out_RV / divisor[:, None], exists[:, None] & (vv < V)[None, :])
    # +inf for a row without keys: its weights exp2(score − inf) are then 0 in the backward pass.
    tl.store(lse + pair * T * M + r, tl.where(total == 0, float("inf"), maximum + tl.log2(divisor)), exists)


@dataclass
class Call:
    """A call as the kernels take it."""

    tensors: tuple[Tensor, Tensor, Tensor]  # q, k, v with neighbouring columns
    optional: tuple[Tensor | None, ...]  # slopes, sinks, mask, and for each key where its document starts and ends
    sizes: tuple[int | None, ...]  # T, S, G, window
    strides: tuple[int, ...]
    # causal; what makes a product a score in units of ln 2, or what tanh takes; softcap in units of ln 2; whether tanh
    # needs all digits; widths, heads that share keys, padded widths, the dtype of sums and the precision of products
    constants: tuple[Any, ...]
    masked: bool
    bounded: bool  # whether more than the number of keys bounds what a query sees from below


def prepare(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    key_padding_mask: Tensor | None,
    seq_idx: Tensor | None,
    causal: bool,
    window: int | None,
    scale: float,
    softcap: float | None,
) -> Call:
    """The call with its documents as intervals of keys."""
    (T, H, K), (S, G, V) = q.shape[1:], v.shape[1:]
    starts = ends = None
    if seq_idx is not None:
        numbers = document_numbers(seq_idx)
        starts = torch.searchsorted(numbers, numbers, out_int32=True)
        ends = torch.searchsorted(numbers, numbers, out_int32=True, right=True)
    mask = None if key_padding_mask is None else key_padding_mask.contiguous().view(torch.uint8)
    q, k, v = rows(q), rows(k), rows(v)
    window = None if window is None or window >= max(T, S) else window
    inner, cap = (scale * LOG2_E, None) if softcap is None else (scale / softcap, softcap * LOG2_E)
    exact, acc = q.dtype == torch.float32, accumulator(q)
    return Call(
        tensors=(q, k, v),
        optional=(*contiguous(alibi_slopes, sinks), mask, starts, ends),
        sizes=(T, S, G, window),
        strides=(*q.stride()[:3], *k.stride()[:3], *v.stride()[:3]),
        constants=(causal, inner, cap, exact, K, V, H // G, padded(K), padded(V), acc, "ieee"),
        masked=mask is not None,
        bounded=window is not None or starts is not None,
    )


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    key_padding_mask: Tensor | None,
    seq_idx: Tensor | None,
    seed: None,
    causal: bool,
    window: int | None,
    scale: float,
    softcap: float | None,
    dropout_p: float,
    chunk_size: None,
) -> tuple[Tensor, Tensor]:
    """The output (B, T, H, V), and the log-sum-exp of each row (B·G, T·M)."""
    (B, T, H, K), (G, V) = q.shape, v.shape[2:]
    out = q.new_empty(B, T, H, V)
    lse = q.new_empty(B * G, T * (H // G), dtype=accumulation_dtype(q))
    if out.numel() == 0:
        return out, lse.fill_(math.inf)
    call = prepare(q, k, v, alibi_slopes, sinks, key_padding_mask, seq_idx, causal, window, scale, softcap)
    with on_device(q):
        own, met, chunk, warps, stages = blocks_for(q.dtype, padded(max(K, V)), 0, T * (H // G))
        blocks, first = triton.cdiv(T * (H // G), own), 2 if call.masked else 0 if call.bounded else 1
        _attend[(B * G * blocks,)](
            *call.tensors, *call.optional, out, lse, *call.sizes, blocks, *call.strides, *call.constants, first,
            own, met, chunk, num_warps=warps, num_stages=stages, **LAUNCH,
        )  # fmt: skip
    return out, lse


def padded(width: int) -> int:
    """Columns of a matrix with those that only fill it up."""
    return max(LEAST, triton.next_power_of_2(width))
