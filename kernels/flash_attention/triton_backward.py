"""Attention on the GPU (backend `triton`), backward: weights are computed again from the saved log-sum-exp
(FlashAttention-2, arXiv 2307.08691).

With P the weights and δ = Σ grad · out:  dv = Pᵀ grad;  ds = P · (grad vᵀ − δ);  dq = scale · ds k;
dk = scale · dsᵀ q;  dslope = −Σ ds · |distance|;  dsink = −Σ exp(sink − lse) · δ.

One kernel goes over blocks of rows, for dq, δ and what each row adds to the gradients of its slope and sink; the other
over blocks of keys, for dk and dv. No two programs write to one place, so that the result is the same each time.

Letters: B batch, T queries, S keys, H query heads, G key/value heads, M = H / G, K head width, V value width; in
kernels R rows (see triton_forward.py) and S keys of a block.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from neural_layers.kernels.flash_attention.triton_blocks import blocks_for
from neural_layers.kernels.flash_attention.triton_forward import (
    dot,
    load_rows,
    padded,
    phases,
    place_rows,
    prepare,
    products,
    row_offsets,
    scores,
    seen_keys,
)
from neural_layers.kernels.triton_support import LAUNCH, on_device, rows


@triton.jit
def centre_of(i, low, high, slope):
    """About the mean distance of each row from its keys, which are weighted by exp(−slope · distance)."""
    nearest = tl.maximum(tl.maximum(low - i, i - (high - 1)), 0).to(slope.dtype)
    half = (high - low).to(slope.dtype) * 0.5
    return nearest + tl.where(slope * half > 1.0, 1.0 / tl.where(slope == 0, 1.0, slope), half)


@triton.jit
def _differentiate_keys(
    sums, q_RK, grad_RV, q_at, grad_at, rows_of, vectors, keys_of, slope, mask, first, last, S,
    INNER: tl.constexpr, CAP: tl.constexpr, EXACT: tl.constexpr, K: tl.constexpr, V: tl.constexpr, SIZE: tl.constexpr,
    EDGE: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr, SLOPES: tl.constexpr,
):  # fmt: skip
    """dq and the sums for the slopes after keys first … last; with EDGE some of them are hidden from some rows."""
    dq_RK, dslope = sums
    i, low, high = rows_of
    lse, delta, centre = vectors
    k, v, k_S, v_S, k_tile, v_tile = keys_of
    kk = tl.arange(0, q_RK.shape[1])
    vv = tl.arange(0, grad_RV.shape[1])
    for s in range(first, last, SIZE):
        key = s + tl.arange(0, SIZE)
        exists = key < S
        k_at = k + s * k_S + k_tile
        v_at = v + s * v_S + v_tile
        k_SK = load_rows(k_at + kk[None, :], exists, kk, K, q_RK.shape[1], EDGE)
        v_SV = load_rows(v_at + vv[None, :], exists, vv, V, grad_RV.shape[1], EDGE)
        zeros = tl.zeros([q_RK.shape[0], SIZE], dq_RK.dtype)
        product = products(q_RK, k_SK, q_at, k_at, exists, zeros, K, CHUNK, PRECISION)
        score, cap_slope = scores(product, i[:, None], key[None, :], slope, INNER, CAP, EXACT)
        weight = tl.exp2(score - lse[:, None])
        grad_weight = products(grad_RV, v_SV, grad_at, v_at, exists, zeros, V, CHUNK, PRECISION)
        grad_score = weight * (grad_weight - delta[:, None])
        if EDGE:
            sees = (low[:, None] <= key[None, :]) & (key[None, :] < high[:, None])
            if mask is not None:
                sees = sees & (tl.load(mask + key, exists, other=0) != 0)[None, :]
            # A fill, not a weight of 0: what is hidden may be NaN or infinite.
            grad_score = tl.where(sees, grad_score, 0.0)
        if SLOPES:
            distance = tl.abs(i.to(dslope.dtype)[:, None] - key.to(dslope.dtype)[None, :])
            dslope -= tl.sum(grad_score * (distance - centre[:, None]), axis=1)
        if CAP is not None:
            grad_score = grad_score * cap_slope
        dq_RK = dot(grad_score.to(k_SK.dtype), k_SK, dq_RK, PRECISION)
    return dq_RK, dslope


@triton.jit
def _differentiate_queries(
    q, k, v, slopes, sinks, mask, starts, ends, grad, out, lse, delta, dq, dslopes, dsinks, T, S, G, window, blocks,
    q_B, q_T, q_H, k_B, k_S, k_G, v_B, v_S, v_G, grad_B, grad_T, grad_H,
    CAUSAL: tl.constexpr, INNER: tl.constexpr, CAP: tl.constexpr, EXACT: tl.constexpr, K: tl.constexpr,
    V: tl.constexpr, M: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    SCALE: tl.constexpr, FIRST: tl.constexpr, R: tl.constexpr, SIZE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """dq and δ of R rows of a pair (b, g), and what each row adds to the gradients of its slope and sink.

    Reads q, grad and out and writes dq, 4·(K + V) bytes a row in bfloat16; keys and values as in the forward pass. For
    each pair of a row and a key that it sees it takes 4·K + 2·V operations in matrix products, an exponential and about
    4 others; 3 to 6 more for each of an edge, ALiBi and the gradient of its slope, and 9 for softcap.
    """
    program = tl.program_id(0).to(tl.int64)
    pair = program // blocks
    b = pair // G
    g = pair - b * G
    r, exists, t, m = place_rows((blocks - 1 - (program - pair * blocks)).to(tl.int32) * R, T, M, R)
    i = t + (S - T)
    kk = tl.arange(0, KP)
    vv = tl.arange(0, VP)
    q_at = q + b * q_B + g * M * q_H + row_offsets(t, m, q_T, q_H)
    grad_at = grad + b * grad_B + g * M * grad_H + row_offsets(t, m, grad_T, grad_H)
    row = (b * T + t) * G * M + g * M + m
    q_RK = load_rows(q_at + kk[None, :], exists, kk, K, KP, False)
    grad_RV = load_rows(grad_at + vv[None, :], exists, vv, V, VP, False)
    out_RV = load_rows(out + row[:, None] * V + vv[None, :], exists, vv, V, VP, False)
    delta_R = tl.sum(out_RV.to(ACC) * grad_RV.to(ACC), axis=1)
    tl.store(delta + pair * T * M + r, delta_R, exists)
    lse_R = tl.load(lse + pair * T * M + r, exists, other=float("inf"))
    k_step = tl.zeros([], tl.int64) + k_S
    v_step = tl.zeros([], tl.int64) + v_S
    n = tl.arange(0, SIZE)[:, None]
    low, high = seen_keys(i, starts, ends, b, S, window, CAUSAL)
    border = phases(low, high, SIZE)
    slope = None
    centre = tl.zeros([R], ACC)
    if slopes is not None:
        slope_R = tl.load(slopes + g * M + m).to(ACC)
        slope = (slope_R * 1.4426950408889634)[:, None]
        centre = centre_of(i, low, high, slope_R)
    if mask is not None:
        mask += b * S
    rows_of = (i, low, high)
    vectors = (lse_R, delta_R, centre)
    keys_of = (k + b * k_B + g * k_G, v + b * v_B + g * v_G, k_step, v_step, n * k_step, n * v_step)
    sums = (tl.zeros([R, KP], ACC), tl.zeros([R], ACC))
    for phase in tl.static_range(FIRST, 3):
        sums = _differentiate_keys(
            sums, q_RK, grad_RV, q_at, grad_at, rows_of, vectors, keys_of, slope, mask,
            border[phase] if FIRST < 2 else border[0], border[phase + 1], S, INNER, CAP, EXACT, K, V, SIZE,
            phase != 1, CHUNK, PRECISION, dslopes is not None,
        )  # fmt: skip
    dq_RK, dslope = sums
    tl.store(dq + row[:, None] * K + kk[None, :], dq_RK * SCALE, exists[:, None] & (kk < K)[None, :])
    dsink = tl.zeros([R], ACC)
    if sinks is not None:
        dsink -= tl.exp2(tl.load(sinks + g * M + m).to(ACC) * 1.4426950408889634 - lse_R) * delta_R
        tl.store(dsinks + pair * T * M + r, dsink, exists)
    if dslopes is not None:
        # The gradients of a row's scores, its sink's among them, sum up to 0: for the slope, distances may be taken
        # less a constant. Where that is about their mean, the rounding of δ does not grow with them.
        tl.store(dslopes + pair * T * M + r, dslope + centre * dsink, exists)


@triton.jit
def _differentiate_rows(
    sums, k_SK, v_SV, keys_of, rows_of, vectors, slope_of, first, last, T, S,
    INNER: tl.constexpr, CAP: tl.constexpr, EXACT: tl.constexpr, K: tl.constexpr, V: tl.constexpr, M: tl.constexpr,
    R: tl.constexpr, EDGE: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv after rows first … last; with EDGE some of them do not see some of the keys."""
    dk_SK, dv_SV = sums
    key, low, high, k_at, v_at = keys_of
    q, q_T, q_H, grad, grad_T, grad_H = rows_of
    lse, delta = vectors
    kk = tl.arange(0, k_SK.shape[1])
    vv = tl.arange(0, v_SV.shape[1])
    for r0 in range(first, last, R):
        r, exists, t, m = place_rows(r0, T, M, R)
        i = t + (S - T)
        slope = None
        if slope_of is not None:
            slope = (tl.load(slope_of + m).to(dk_SK.dtype) * 1.4426950408889634)[None, :]
        q_at = q + row_offsets(t, m, q_T, q_H)
        grad_at = grad + row_offsets(t, m, grad_T, grad_H)
        q_RK = load_rows(q_at + kk[None, :], exists, kk, K, k_SK.shape[1], False)
        grad_RV = load_rows(grad_at + vv[None, :], exists, vv, V, v_SV.shape[1], False)
        lse_R = tl.load(lse + t * M + m)
        delta_R = tl.load(delta + t * M + m)
        zeros = tl.zeros([k_SK.shape[0], R], dk_SK.dtype)
        product = products(k_SK, q_RK, k_at, q_at, exists, zeros, K, CHUNK, PRECISION)
        score, cap_slope = scores(product, i[None, :], key[:, None], slope, INNER, CAP, EXACT)
        weight = tl.exp2(score - lse_R[None, :])
        if EDGE:
            sees = (low[:, None] <= r[None, :]) & (r[None, :] < high[:, None])
            weight = tl.where(sees, weight, 0.0)
        dv_SV = dot(weight.to(grad_RV.dtype), grad_RV, dv_SV, PRECISION)
        grad_weight = products(v_SV, grad_RV, v_at, grad_at, exists, zeros, V, CHUNK, PRECISION)
        grad_score = weight * (grad_weight - delta_R[None, :])
        if CAP is not None:
            grad_score = grad_score * cap_slope
        if EDGE:
            # A fill, not a weight of 0: what is hidden may be NaN or infinite.
            grad_score = tl.where(sees, grad_score, 0.0)
        dk_SK = dot(grad_score.to(q_RK.dtype), q_RK, dk_SK, PRECISION)
    return dk_SK, dv_SV


@triton.jit
def _differentiate_keys_and_values(
    q, k, v, slopes, sinks, mask, starts, ends, grad, lse, delta, dk, dv, T, S, G, window, blocks,
    q_B, q_T, q_H, k_B, k_S, k_G, v_B, v_S, v_G, grad_B, grad_T, grad_H,
    CAUSAL: tl.constexpr, INNER: tl.constexpr, CAP: tl.constexpr, EXACT: tl.constexpr, K: tl.constexpr,
    V: tl.constexpr, M: tl.constexpr, KP: tl.constexpr, VP: tl.constexpr, ACC: tl.constexpr, PRECISION: tl.constexpr,
    SCALE: tl.constexpr, FIRST: tl.constexpr, SIZE: tl.constexpr, R: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """dk and dv of SIZE keys of a pair (b, g), the sum over all rows that see them.

    Reads k and v and writes dk and dv once, 4·(K + V) bytes a key in bfloat16; q and grad once for each block of keys
    that rows see, from the L2 cache but for the first. For each pair of a row and a key that it sees it takes
    4·(K + V) operations in matrix products, an exponential and about 4 others; 5 more in a block with an edge, 3 for
    ALiBi and 9 for softcap.
    """
    program = tl.program_id(0).to(tl.int64)
    pair = program // blocks
    b = pair // G
    g = pair - b * G
    all_keys = (program - pair * blocks).to(tl.int32) * SIZE + tl.arange(0, SIZE)
    exists = all_keys < S
    key = tl.minimum(all_keys, S - 1)
    kk = tl.arange(0, KP)
    vv = tl.arange(0, VP)
    at = key.to(tl.int64)[:, None]
    k_at = k + b * k_B + g * k_G + at * k_S
    v_at = v + b * v_B + g * v_G + at * v_S
    k_SK = load_rows(k_at + kk[None, :], exists, kk, K, KP, False)
    v_SV = load_rows(v_at + vv[None, :], exists, vv, V, VP, False)
    # Positions of the first query that sees each key, and of the one after the last.
    low = tl.zeros_like(key) + (S - T)
    high = tl.zeros_like(key) + S
    if window is not None:
        low = tl.maximum(low, key - window + 1)
        high = tl.minimum(high, key + window)
    if CAUSAL:
        low = tl.maximum(low, key)
    if starts is not None:
        low = tl.maximum(low, tl.load(starts + b * S + key))
        high = tl.minimum(high, tl.load(ends + b * S + key))
    low = (low - (S - T)) * M
    high = (high - (S - T)) * M
    border = phases(low, high, R)
    if slopes is not None:
        slopes += g * M
    zeros = tl.zeros([], tl.int64)
    keys_of = (key, low, high, k_at, v_at)
    rows_of = (
        q + b * q_B + g * M * q_H, zeros + q_T, zeros + q_H,
        grad + b * grad_B + g * M * grad_H, zeros + grad_T, zeros + grad_H,
    )  # fmt: skip
    vectors = (lse + pair * T * M, delta + pair * T * M)
    sums = (tl.zeros([SIZE, KP], ACC), tl.zeros([SIZE, VP], ACC))
    for phase in tl.static_range(FIRST, 3):
        sums = _differentiate_rows(
            sums, k_SK, v_SV, keys_of, rows_of, vectors, slopes, border[phase], border[phase + 1], T, S, INNER, CAP,
            EXACT, K, V, M, R, phase != 1, CHUNK, PRECISION,
        )  # fmt: skip
    dk_SK, dv_SV = sums
    if mask is not None:
        counts = (tl.load(mask + b * S + key) != 0)[:, None]
        dk_SK = tl.where(counts, dk_SK, 0.0)
        dv_SV = tl.where(counts, dv_SV, 0.0)
    row = ((b * S + key) * G + g)[:, None]
    tl.store(dk + row * K + kk[None, :], dk_SK * SCALE, exists[:, None] & (kk < K)[None, :])
    tl.store(dv + row * V + vv[None, :], dv_SV, exists[:, None] & (vv < V)[None, :])


def backward(
    grad: Tensor,
    out: Tensor,
    lse: Tensor,
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
    slopes_need_grad: bool,
) -> list[Tensor]:
    """The gradients of q, k, v, of alibi_slopes where asked for, and of sinks where there are any."""
    (B, T, H, K), (S, G, V) = q.shape, v.shape[1:]
    parameters = [alibi_slopes] if slopes_need_grad else []
    parameters += [] if sinks is None else [sinks]
    if out.numel() == 0:
        return [x.new_zeros(x.shape) for x in (q, k, v, *parameters) if x is not None]
    dq, dk, dv = (x.new_empty(x.shape) for x in (q, k, v))
    delta = torch.empty_like(lse)
    dslopes = torch.empty_like(lse) if slopes_need_grad else None
    dsinks = None if sinks is None else torch.empty_like(lse)
    call = prepare(q, k, v, alibi_slopes, sinks, key_padding_mask, seq_idx, causal, window, scale, softcap)
    grad, out, lse = rows(grad), out.contiguous(), lse.contiguous()
    with on_device(q):
        own, met, chunk, warps, stages = blocks_for(q.dtype, padded(max(K, V)), 1, T * (H // G))
        blocks, first = triton.cdiv(T * (H // G), own), 2 if call.masked else 0 if call.bounded else 1
        _differentiate_queries[(B * G * blocks,)](
            *call.tensors, *call.optional, grad, out, lse, delta, dq, dslopes, dsinks, *call.sizes, blocks,
            *call.strides, *grad.stride()[:3], *call.constants, scale, first, own, met, chunk, num_warps=warps,
            num_stages=stages, **LAUNCH,
        )  # fmt: skip
        if S > 0:
            own, met, chunk, warps, stages = blocks_for(q.dtype, padded(max(K, V)), 2, S)
            blocks, first = triton.cdiv(S, own), 0 if causal or call.bounded else 1
            _differentiate_keys_and_values[(B * G * blocks,)](
                *call.tensors, *call.optional, grad, lse, delta, dk, dv, *call.sizes, blocks, *call.strides,
                *grad.stride()[:3], *call.constants, scale, first, own, met, chunk, num_warps=warps,
                num_stages=stages, **LAUNCH,
            )  # fmt: skip
    sums = [x.view(B, G, T, H // G).sum(dim=(0, 2)).view(H) for x in (dslopes, dsinks) if x is not None]
    pairs = zip(sums, parameters, strict=True)
    return [dq, dk, dv, *(x.to(parameter.dtype) for x, parameter in pairs if parameter is not None)]
