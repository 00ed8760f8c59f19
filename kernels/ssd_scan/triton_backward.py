"""The gradients of the Mamba-2 scan on the GPU (backend `triton`), from the states kept before each chunk.

With G_t the gradient of h_t C_t + D x_t, g that of the state after the chunk, v = Δ x, and the letters of
triton_forward.py:

    dv_s = Σ_{t ≥ s} e^{s_t − s_s} (C_t·B_s) G_t + e^{s_end − s_s} g B_s          dx = Δ dv + D G
    dC_t = Σ_{s ≤ t} k_ts B_s + Σ_heads e^{s_t} G_t·h      with k_ts = Σ_heads e^{s_t − s_s} G_t·v_s
    dB_s = Σ_{t ≥ s} k_ts C_t + Σ_heads e^{s_end − s_s} v_s·g
    dh   = e^{s_end} g + Σ_t e^{s_t} G_t C_tᵀ

The gradient of Δ_t A is all that flows past the border before token t: from earlier tokens and from h to this token and
later ones, and from h and earlier tokens to the state after the chunk.

Kernels as in the forward pass: what each chunk says about the state before it; the gradients of the states, chunk
before chunk; all other gradients, in two kernels, for the sake of registers. Those of B and C are written for each
head, and torch adds the heads of a group; what a
token contributes to the gradients of dt, A, D and dt_bias is one number a head, and torch adds it up. No atomics.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from neural_layers.kernels.ssd_scan.triton_forward import (
    LEAST,
    all_finite,
    block,
    decay,
    dot,
    dot_of_tokens,
    load_chunk,
    pass_states,
    steps,
)
from neural_layers.kernels.triton_support import LAUNCH, on_device, rows


@triton.jit
def _load_gradient(grad_y, z, b, t, h, p, mask, y_B, y_T, y_H, z_B, z_T, z_H, HAS_Z: tl.constexpr, ACC: tl.constexpr):
    """The gradient of what is gated, and the factor of that of z."""
    grad = tl.load(grad_y + b * y_B + t[:, None] * y_T + h * y_H + p[None, :], mask, other=0.0).to(ACC)
    slope = grad
    if HAS_Z:
        z_CP = tl.load(z + b * z_B + t[:, None] * z_T + h * z_H + p[None, :], mask, other=0.0).to(ACC)
        s = tl.sigmoid(z_CP)
        slope = grad * s * (1 + z_CP * (1 - s))
        grad = grad * z_CP * s
    return grad, slope


@triton.jit
def _chunk_carries(
    grad_y, z, sums, documents, C, out, length, heads, groups, chunks,
    y_B, y_T, y_H, z_B, z_T, z_H, C_B, C_T, C_G,
    P: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr, CS: tl.constexpr, PS: tl.constexpr, NS: tl.constexpr,
    HAS_Z: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Σ_t e^{s_t} G_t C_tᵀ, a block of (P, N) of one chunk and head.

    Reads grad_y, z and C and writes a state: 4·P + 2·N bytes a token and head in bfloat16 and 4·P·N/CHUNK, for 2·P·N
    operations.
    """
    program = tl.program_id(0).to(tl.int64)
    j = program % chunks
    h = program // chunks % heads
    b = program // chunks // heads
    g = h // (heads // groups)
    t, exists, s, _, d, _, d_before = load_chunk(sums, documents, b, h, j, length, heads, CHUNK, CS)
    p = tl.program_id(1) * PS + tl.arange(0, PS)
    n = tl.program_id(2) * NS + tl.arange(0, NS)
    continues = exists & (d == d_before)
    grad, _ = _load_gradient(
        grad_y, z, b, t, h, p, exists[:, None] & (p < P)[None, :], y_B, y_T, y_H, z_B, z_T, z_H, HAS_Z, ACC
    )
    C_CN = tl.load(C + b * C_B + t[:, None] * C_T + g * C_G + n[None, :], exists[:, None] & (n < N)[None, :], other=0.0)
    # Fills, not products with 0: another document may have NaN or inf to say.
    grad = tl.where(continues[:, None], grad * decay(s, continues, ACC)[:, None], 0.0)
    C_CN = tl.where(continues[:, None], C_CN.to(ACC), 0.0)
    state = dot(tl.trans(grad), C_CN, tl.zeros([PS, NS], ACC), DOT, PRECISION)
    out += ((j * (tl.num_programs(0) // chunks // heads) + b) * heads + h) * P * N
    tl.store(out + p[:, None] * N + n[None, :], state, (p < P)[:, None] & (n < N)[None, :])


@triton.jit
def _gradients_of_B_and_C(
    grad_y, x, delta, sums, documents, B, C, z, states, carries, grad_B, grad_C, length, heads, groups, chunks,
    y_B, y_T, y_H, x_B, x_T, x_H, B_B, B_T, B_G, C_B, C_T, C_G, z_B, z_T, z_H,
    P: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr, CS: tl.constexpr, PS: tl.constexpr, NS: tl.constexpr,
    HAS_Z: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """This head's grad_B and grad_C for the tokens of one chunk.

    Reads grad_y, x, z, B, C and two states and writes two gradients: 6·P + 12·N bytes a token and head in bfloat16 and
    8·P·N/CHUNK, for 2·(2·CHUNK·N + CHUNK·P + 2·N·P) operations.
    """
    program = tl.program_id(0).to(tl.int64)
    j = program % chunks
    h = program // chunks % heads
    b = program // chunks // heads
    g = h // (heads // groups)
    t, exists, s, s_end, d, d_end, d_before = load_chunk(sums, documents, b, h, j, length, heads, CHUNK, CS)
    p = tl.arange(0, PS)
    c = tl.arange(0, CS)
    mask = exists[:, None] & (p < P)[None, :]
    token = (b * length + t) * heads + h
    delta_C = tl.load(delta + token, exists, other=0.0)
    x_CP = tl.load(x + b * x_B + t[:, None] * x_T + h * x_H + p[None, :], mask, other=0.0).to(ACC)
    grad, _ = _load_gradient(grad_y, z, b, t, h, p, mask, y_B, y_T, y_H, z_B, z_T, z_H, HAS_Z, ACC)
    continues = exists & (d == d_before)
    arrives = exists & (d == d_end)
    from_start = decay(s, continues, ACC)
    to_end = decay(s_end - s, arrives, ACC)
    sees = (c[:, None] >= c[None, :]) & (d[:, None] == d[None, :]) & exists[None, :]
    decay_CC = decay(s[:, None] - s[None, :], sees, ACC)
    # k_ts, and then some columns of N at a time.
    products = dot(grad, tl.trans(x_CP * delta_C[:, None]), tl.zeros([CS, CS], ACC), DOT, PRECISION)
    products = tl.where(sees, products * decay_CC, 0.0)
    into_state = tl.where(arrives[:, None], x_CP * (to_end * delta_C)[:, None], 0.0)
    from_state = tl.where(continues[:, None], grad * from_start[:, None], 0.0)
    at_state = ((j * (tl.num_programs(0) // chunks // heads) + b) * heads + h) * P * N
    for first in range(0, N, NS):
        n = first + tl.arange(0, NS)
        n_mask = exists[:, None] & (n < N)[None, :]
        B_CN = tl.load(B + b * B_B + t[:, None] * B_T + g * B_G + n[None, :], n_mask, other=0.0).to(ACC)
        C_CN = tl.load(C + b * C_B + t[:, None] * C_T + g * C_G + n[None, :], n_mask, other=0.0).to(ACC)
        pn_mask = (p < P)[:, None] & (n < N)[None, :]
        state_PN = tl.load(states + at_state + p[:, None] * N + n[None, :], pn_mask, other=0.0)
        carry_PN = tl.load(carries + at_state + p[:, None] * N + n[None, :], pn_mask, other=0.0)
        part = dot_of_tokens(products, B_CN, tl.zeros([CS, NS], ACC), DOT, PRECISION)
        part = dot(from_state, state_PN, part, DOT, PRECISION)
        tl.store(grad_C + token[:, None] * N + n[None, :], part, n_mask)
        part = dot_of_tokens(tl.trans(products), C_CN, tl.zeros([CS, NS], ACC), DOT, PRECISION)
        part = dot(into_state, carry_PN, part, DOT, PRECISION)
        tl.store(grad_B + token[:, None] * N + n[None, :], part, n_mask)


@triton.jit
def _chunk_gradients(
    grad_y, x, delta, sums, documents, B, C, D, z, states, carries,
    grad_x, grad_z, grad_delta, flow, grad_D, length, heads, groups, chunks,
    y_B, y_T, y_H, x_B, x_T, x_H, B_B, B_T, B_G, C_B, C_T, C_G, z_B, z_T, z_H,
    P: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr, CS: tl.constexpr, PS: tl.constexpr, NS: tl.constexpr,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradients of x and z for the tokens of one chunk and head, and those of dt, A, D in parts.

    Reads grad_y, x, z, B, C and two states and writes two gradients: 10·P + 4·N bytes a token and head in bfloat16 and
    8·P·N/CHUNK, for 2·(CHUNK·N + 3·CHUNK·P + 2·N·P) operations.
    """
    program = tl.program_id(0).to(tl.int64)
    j = program % chunks
    h = program // chunks % heads
    b = program // chunks // heads
    g = h // (heads // groups)
    t, exists, s, s_end, d, d_end, d_before = load_chunk(sums, documents, b, h, j, length, heads, CHUNK, CS)
    p = tl.arange(0, PS)
    c = tl.arange(0, CS)
    mask = exists[:, None] & (p < P)[None, :]
    token = (b * length + t) * heads + h
    delta_C = tl.load(delta + token, exists, other=0.0)
    continues = exists & (d == d_before)
    arrives = exists & (d == d_end)
    from_start = decay(s, continues, ACC)
    to_end = decay(s_end - s, arrives, ACC)
    sees = (c[:, None] >= c[None, :]) & (d[:, None] == d[None, :]) & exists[None, :]
    decay_CC = decay(s[:, None] - s[None, :], sees, ACC)
    scores = tl.zeros([CS, CS], ACC)
    read = tl.zeros([CS, PS], ACC)
    across = tl.zeros([CS, PS], ACC)
    passing = tl.zeros([PS], ACC)
    at_state = ((j * (tl.num_programs(0) // chunks // heads) + b) * heads + h) * P * N
    for first in range(0, N, NS):
        n = first + tl.arange(0, NS)
        n_mask = exists[:, None] & (n < N)[None, :]
        B_CN = tl.load(B + b * B_B + t[:, None] * B_T + g * B_G + n[None, :], n_mask, other=0.0).to(ACC)
        C_CN = tl.load(C + b * C_B + t[:, None] * C_T + g * C_G + n[None, :], n_mask, other=0.0).to(ACC)
        pn_mask = (p < P)[:, None] & (n < N)[None, :]
        state_PN = tl.load(states + at_state + p[:, None] * N + n[None, :], pn_mask, other=0.0)
        carry_PN = tl.load(carries + at_state + p[:, None] * N + n[None, :], pn_mask, other=0.0)
        scores = dot(C_CN, tl.trans(B_CN), scores, DOT, PRECISION)
        read = dot(C_CN, tl.trans(state_PN), read, DOT, PRECISION)
        across = dot(B_CN, tl.trans(carry_PN), across, DOT, PRECISION)
        passing += tl.sum(state_PN * carry_PN, axis=1)

    x_CP = tl.load(x + b * x_B + t[:, None] * x_T + h * x_H + p[None, :], mask, other=0.0).to(ACC)
    grad, slope = _load_gradient(grad_y, z, b, t, h, p, mask, y_B, y_T, y_H, z_B, z_T, z_H, HAS_Z, ACC)
    weights = tl.where(sees, scores * decay_CC, 0.0)
    read = tl.where(continues[:, None], read * from_start[:, None], 0.0)
    across = tl.where(arrives[:, None], across * to_end[:, None], 0.0)
    grad_drive = dot_of_tokens(tl.trans(weights), grad, across, DOT, PRECISION)
    out_x = grad_drive * delta_C[:, None]
    if HAS_Z:
        out = dot_of_tokens(weights * delta_C[None, :], x_CP, read, DOT, PRECISION)
        if HAS_D:
            out += tl.load(D + h).to(ACC) * x_CP
        tl.store(grad_z + token[:, None] * P + p[None, :], slope * out, mask)
    if HAS_D:
        out_x += tl.load(D + h).to(ACC) * grad
        tl.store(grad_D + token, tl.sum(grad * x_CP, axis=1), exists)
    tl.store(grad_x + token[:, None] * P + p[None, :], out_x, mask)
    tl.store(grad_delta + token, tl.sum(grad_drive * x_CP, axis=1), exists)

    products = dot(grad, tl.trans(x_CP * delta_C[:, None]), tl.zeros([CS, CS], ACC), DOT, PRECISION)
    products = tl.where(sees, products * decay_CC, 0.0)
    # Past the border before token b flows Σ_{t ≥ b > s}, which is Σ_{t ≥ b} less what came from b and later: in float64
    # exact, as each product stands in both.
    products = tl.where(sees & (c[:, None] > c[None, :]), products * scores, 0.0).to(tl.float64)
    arriving = tl.where(continues, tl.sum(grad * read, axis=1), 0.0).to(tl.float64)
    within = tl.sum(products, axis=1) - tl.sum(products, axis=0)
    later = c[None, :] >= c[:, None]
    total = tl.sum(tl.where(later, within[None, :], 0.0), axis=1)
    if not all_finite(products):
        # NaN stands in both sums too, and would reach the borders that it does not pass.
        for k in range(CS):
            passes = (c[:, None] >= k) & (c[None, :] < k)
            total = tl.where(c == k, tl.sum(tl.sum(tl.where(passes, products, 0.0), axis=1), axis=0), total)
    total += tl.sum(tl.where(later, arriving[None, :], 0.0), axis=1)
    leaving = tl.where(arrives, tl.sum(x_CP * delta_C[:, None] * across, axis=1), 0.0).to(tl.float64)
    total += tl.sum(tl.where(later, 0.0, leaving[None, :]), axis=1)
    whole = tl.where(d_end == d_before, tl.sum(passing, axis=0) * tl.exp(s_end.to(ACC)), 0.0)
    tl.store(flow + token, total + whole, exists)


def backward(
    grad_y: Tensor,
    grad_final_state: Tensor | None,
    kept: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    dt_softplus: bool,
    chunk_size: int,
) -> list[Tensor]:
    """The gradients of x, dt, A, B, C, and of D, z, dt_bias, initial_state where given."""
    (batch, length, heads, width), (groups, size), dtype = x.shape, B.shape[2:], kept.dtype
    given = (x, dt, A, B, C, D, z, dt_bias, initial_state)
    if x.numel() == 0:
        return _nothing(given, grad_final_state, initial_state)
    s = steps(x, dt, A, B, C, dt_bias, seq_idx, dt_softplus, chunk_size, dtype)
    x, B, C, z, grad_y = rows(x), rows(B), rows(C), rows(z), rows(grad_y)
    carries, grad_start = torch.empty_like(kept), torch.empty_like(kept[0])
    grad_x, grad_z = x.new_empty(x.shape), None if z is None else z.new_empty(z.shape)
    grad_delta, grad_D, flow = s.delta.new_empty(3, *s.delta.shape)
    grad_B, grad_C = kept.new_empty(2, batch, length, heads, size)
    y_strides, z_strides = grad_y.stride()[:3], (x if z is None else z).stride()[:3]
    common = length, heads, groups, s.chunks
    block_p, block_n, whole_p = block(width), block(size), max(LEAST, triton.next_power_of_2(width))
    programs = batch * heads * s.chunks
    with on_device(x):
        _chunk_carries[(programs, triton.cdiv(width, block_p), triton.cdiv(size, block_n))](
            grad_y, x if z is None else z, s.sums, s.documents, C, carries, *common, *y_strides, *z_strides,
            *C.stride()[:3], width, size, chunk_size, s.padded, block_p, block_n,
            z is not None, s.acc, s.dot, s.precision, num_warps=4, **LAUNCH,
        )  # fmt: skip
        pass_states(s, carries, grad_final_state, grad_start, chunk_size, reverse=True)
        columns = LEAST if dtype == torch.float64 else min(32, block_n)
        _gradients_of_B_and_C[(programs,)](
            grad_y, x, s.delta, s.sums, s.documents, B, C, x if z is None else z, kept, carries, grad_B, grad_C,
            *common, *y_strides, *x.stride()[:3], *B.stride()[:3], *C.stride()[:3], *z_strides,
            width, size, chunk_size, s.padded, whole_p, columns,
            z is not None, s.acc, s.dot, s.precision, num_warps=8, **LAUNCH,
        )  # fmt: skip
        _chunk_gradients[(programs,)](
            grad_y, x, s.delta, s.sums, s.documents, B, C, None if D is None else D.contiguous(), x if z is None else z,
            kept, carries, grad_x, grad_x if grad_z is None else grad_z, grad_delta, flow, grad_D,
            *common, *y_strides, *x.stride()[:3], *B.stride()[:3], *C.stride()[:3], *z_strides,
            width, size, chunk_size, s.padded, whole_p, columns,
            D is not None, z is not None, s.acc, s.dot, s.precision, num_warps=8, **LAUNCH,
        )  # fmt: skip
    grad_raw = torch.addcmul(grad_delta, flow, A.to(dtype))
    if dt_softplus:
        grad_raw = grad_raw * torch.sigmoid(s.raw)
    gradients = (
        grad_x,
        grad_raw,
        (flow * s.delta).sum(dim=(0, 1)),
        *(v.unflatten(2, (groups, -1)).sum(dim=3) for v in (grad_B, grad_C)),
        None if D is None else grad_D.sum(dim=(0, 1)),
        grad_z,
        grad_raw.sum(dim=(0, 1)),
        grad_start,
    )
    # Copies where the dtype stays: no output of an op may share memory with another.
    return [g.to(v.dtype, copy=True) for v, g in zip(given, gradients, strict=True) if v is not None and g is not None]


def _nothing(
    given: tuple[Tensor | None, ...], grad_final_state: Tensor | None, initial_state: Tensor | None
) -> list[Tensor]:
    """The gradients where there are no tokens."""
    gradients = [torch.zeros_like(v, memory_format=torch.contiguous_format) for v in given if v is not None]
    if initial_state is not None and grad_final_state is not None:
        gradients[-1].copy_(grad_final_state)
    return gradients
