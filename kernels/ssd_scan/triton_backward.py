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
before chunk; all other gradients, in a kernel for each, for the sake of registers. That of z is the output before its
gate times a factor, and comes from the kernel of the forward pass. Those of B and C are written for each head, and
torch adds the heads of a group; what a token contributes to the gradients of dt, A, D and dt_bias is one number a head,
and torch adds it up. No atomics.
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
    chunk_outputs,
    decay,
    dot,
    dot_of_rows,
    finite,
    load_chunk,
    output_block,
    pass_states,
    spoil,
    steps,
)
from neural_layers.kernels.triton_support import LAUNCH, on_device, rows


@triton.jit
def _load_gradient(grad_y, z, b, t, h, p, mask, y_B, y_T, y_H, z_B, z_T, z_H, HAS_Z: tl.constexpr, ACC: tl.constexpr):
    """The gradient of what is gated."""
    grad = tl.load(grad_y + b * y_B + t[:, None] * y_T + h * y_H + p[None, :], mask, other=0.0).to(ACC)
    if HAS_Z:
        z_CP = tl.load(z + b * z_B + t[:, None] * z_T + h * z_H + p[None, :], mask, other=0.0).to(ACC)
        grad = grad * z_CP * tl.sigmoid(z_CP)
    return grad


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
    grad = _load_gradient(
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
    grad_y, x, delta, sums, documents, B, C, z, states, carries, grad_B, grad_C, flow, length, heads, groups, chunks,
    y_B, y_T, y_H, x_B, x_T, x_H, B_B, B_T, B_G, C_B, C_T, C_G, z_B, z_T, z_H,
    P: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr, CS: tl.constexpr, PS: tl.constexpr, NS: tl.constexpr,
    HAS_Z: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What PS columns of this head contribute to grad_B and grad_C of the tokens of one chunk, and to those of Δ A.

    Reads grad_y, x, z, B, C and two states and writes two gradients: 6·P + 12·N bytes a token and head in bfloat16 and
    8·P·N/CHUNK, for 2·(3·CHUNK·N + CHUNK·P + 2·N·P) operations.
    """
    program = tl.program_id(0).to(tl.int64)
    j = program % chunks
    h = program // chunks % heads
    b = program // chunks // heads
    g = h // (heads // groups)
    t, exists, s, s_end, d, d_end, d_before = load_chunk(sums, documents, b, h, j, length, heads, CHUNK, CS)
    p = tl.program_id(1) * PS + tl.arange(0, PS)
    c = tl.arange(0, CS)
    mask = exists[:, None] & (p < P)[None, :]
    token = (b * length + t) * heads + h
    delta_C = tl.load(delta + token, exists, other=0.0)
    token += tl.program_id(1).to(tl.int64) * length * (tl.num_programs(0) // chunks)
    x_CP = tl.load(x + b * x_B + t[:, None] * x_T + h * x_H + p[None, :], mask, other=0.0).to(ACC)
    grad = _load_gradient(grad_y, z, b, t, h, p, mask, y_B, y_T, y_H, z_B, z_T, z_H, HAS_Z, ACC)
    continues = exists & (d == d_before)
    arrives = exists & (d == d_end)
    # k_ts, its rows the tokens s and its columns the tokens t that see them, and then some columns of N at a time.
    seen = (c[:, None] <= c[None, :]) & (d[:, None] == d[None, :])
    drive = x_CP * delta_C[:, None]
    products = dot(drive, tl.trans(grad), tl.zeros([CS, CS], ACC), DOT, PRECISION)
    products = tl.where(seen, products * decay(s[None, :] - s[:, None], seen, ACC), 0.0)
    at_state = ((j * (tl.num_programs(0) // chunks // heads) + b) * heads + h) * P * N
    B += b * B_B + t[:, None] * B_T + g * B_G
    C += b * C_B + t[:, None] * C_T + g * C_G
    grad_B += token[:, None] * N
    grad_C += token[:, None] * N
    doubt = tl.zeros([CS, NS], ACC)
    # One loop for each gradient, for the sake of registers.
    arriving = tl.zeros([CS], ACC)
    left = tl.trans(products)
    from_state = tl.where(continues[:, None], grad * decay(s, continues, ACC)[:, None], 0.0)
    for first in range(0, N, NS):
        n = first + tl.arange(0, NS)
        n_mask = exists[:, None] & (n < N)[None, :]
        pn_mask = (p < P)[:, None] & (n < N)[None, :]
        state_PN = tl.load(states + at_state + p[:, None] * N + n[None, :], pn_mask, other=0.0)
        # A fill, not a product with 0: the document before may have left NaN or inf.
        part = dot(from_state, state_PN, tl.zeros([CS, NS], ACC), DOT, PRECISION)
        part = tl.where(continues[:, None], part, 0.0)
        arriving += tl.sum(part * tl.load(C + n[None, :], n_mask, other=0.0).to(ACC), axis=1)
        B_CN = tl.load(B + n[None, :], n_mask, other=0.0).to(ACC)
        doubt += B_CN * 0.0
        part = dot(left, finite(B_CN), part, DOT, PRECISION)
        tl.store(grad_C + n[None, :], part, n_mask)

    leaving = tl.zeros([CS], ACC)
    passing = tl.zeros([PS, NS], ACC)
    into_state = tl.where(arrives[:, None], drive * decay(s_end - s, arrives, ACC)[:, None], 0.0)
    for first in range(0, N, NS):
        n = first + tl.arange(0, NS)
        n_mask = exists[:, None] & (n < N)[None, :]
        pn_mask = (p < P)[:, None] & (n < N)[None, :]
        carry_PN = tl.load(carries + at_state + p[:, None] * N + n[None, :], pn_mask, other=0.0)
        passing += carry_PN * tl.load(states + at_state + p[:, None] * N + n[None, :], pn_mask, other=0.0)
        part = dot(into_state, carry_PN, tl.zeros([CS, NS], ACC), DOT, PRECISION)
        part = tl.where(arrives[:, None], part, 0.0)
        leaving += tl.sum(part * tl.load(B + n[None, :], n_mask, other=0.0).to(ACC), axis=1)
        C_CN = tl.load(C + n[None, :], n_mask, other=0.0).to(ACC)
        doubt += C_CN * 0.0
        part = dot(products, finite(C_CN), part, DOT, PRECISION)
        tl.store(grad_B + n[None, :], part, n_mask)

    # Past the border before token b flows Σ_{t ≥ b > s}: sums along t, then along s, and no differences, which would
    # lose digits and spread NaN.
    scores = dot_of_rows(B, C, exists, N, CS, NS, ACC, DOT, PRECISION)
    within = tl.cumsum(tl.where(seen, products * scores, 0.0), axis=1, reverse=True)
    before = c[:, None] < c[None, :]
    leaving = tl.where(arrives, leaving, 0.0)
    arriving = tl.where(continues, arriving, 0.0)
    total = tl.sum(tl.where(before, within + leaving[:, None], arriving[:, None]), axis=0)
    whole = tl.where(d_end == d_before, tl.sum(tl.sum(passing, axis=1), axis=0) * tl.exp(s_end.to(ACC)), 0.0)
    tl.store(flow + token, total + whole, exists)
    if not all_finite(doubt):
        tl.debug_barrier()
        for first in range(0, N, NS):
            n = first + tl.arange(0, NS)
            n_mask = exists[:, None] & (n < N)[None, :]
            spoil(grad_C + n[None, :], tl.load(B + n[None, :], n_mask, other=0.0).to(ACC), n_mask, d, CS, False)
            spoil(grad_B + n[None, :], tl.load(C + n[None, :], n_mask, other=0.0).to(ACC), n_mask, d, CS, True)


@triton.jit
def _gradient_of_x(
    grad_y, x, delta, sums, documents, B, C, D, z, carries, grad_x, grad_delta, grad_D, length, heads, groups, chunks,
    y_B, y_T, y_H, x_B, x_T, x_H, B_B, B_T, B_G, C_B, C_T, C_G, z_B, z_T, z_H,
    P: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr, CS: tl.constexpr, PS: tl.constexpr, NS: tl.constexpr,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The gradient of x for the tokens of one chunk and head, and what they contribute to those of Δ and D.

    Reads grad_y, x, z, B, C and a state and writes a gradient: 8·P + 4·N bytes a token and head in bfloat16 and
    4·P·N/CHUNK, for 2·(CHUNK·N + CHUNK·P + N·P) operations.
    """
    program = tl.program_id(0).to(tl.int64)
    j = program % chunks
    h = program // chunks % heads
    b = program // chunks // heads
    g = h // (heads // groups)
    t, exists, s, s_end, d, d_end, _ = load_chunk(sums, documents, b, h, j, length, heads, CHUNK, CS)
    p = tl.program_id(1) * PS + tl.arange(0, PS)
    c = tl.arange(0, CS)
    carries += ((j * (tl.num_programs(0) // chunks // heads) + b) * heads + h) * P * N
    B += b * B_B + t[:, None] * B_T + g * B_G
    C += b * C_B + t[:, None] * C_T + g * C_G
    scores = dot_of_rows(B, C, exists, N, CS, NS, ACC, DOT, PRECISION)
    across = tl.zeros([CS, PS], ACC)
    for first in range(0, N, NS):
        n = first + tl.arange(0, NS)
        B_CN = tl.load(B + n[None, :], exists[:, None] & (n < N)[None, :], other=0.0).to(ACC)
        carry_PN = tl.load(carries + p[:, None] * N + n[None, :], (p < P)[:, None] & (n < N)[None, :], other=0.0)
        across = dot(B_CN, tl.trans(carry_PN), across, DOT, PRECISION)

    # Rows are the tokens s, columns the tokens t that see them.
    seen = (c[:, None] <= c[None, :]) & (d[:, None] == d[None, :])
    weights = tl.where(seen, scores * decay(s[None, :] - s[:, None], seen, ACC), 0.0)
    arrives = exists & (d == d_end)
    across = tl.where(arrives[:, None], across * decay(s_end - s, arrives, ACC)[:, None], 0.0)
    mask = exists[:, None] & (p < P)[None, :]
    grad = _load_gradient(grad_y, z, b, t, h, p, mask, y_B, y_T, y_H, z_B, z_T, z_H, HAS_Z, ACC)
    grad_drive = dot(weights, finite(grad), across, DOT, PRECISION)
    x_CP = tl.load(x + b * x_B + t[:, None] * x_T + h * x_H + p[None, :], mask, other=0.0).to(ACC)
    token = (b * length + t) * heads + h
    out = grad_drive * tl.load(delta + token, exists, other=0.0)[:, None]
    grad_x += token[:, None] * P + p[None, :]
    token += tl.program_id(1).to(tl.int64) * length * (tl.num_programs(0) // chunks)
    tl.store(grad_delta + token, tl.sum(grad_drive * x_CP, axis=1), exists)
    if HAS_D:
        out += tl.load(D + h).to(ACC) * grad
        tl.store(grad_D + token, tl.sum(grad * x_CP, axis=1), exists)
    tl.store(grad_x, out, mask)
    if not all_finite(grad):
        tl.debug_barrier()
        spoil(grad_x, grad, mask, d, CS, True)
        is_spoilt = tl.sum(tl.where(grad * 0.0 != 0.0, 1, 0), axis=1) > 0
        spoilt = tl.sum(tl.where(seen & is_spoilt[None, :], 1, 0), axis=1) > 0
        tl.store(grad_delta + token, float("nan"), exists & spoilt)


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
    block_p, block_n = block(width), block(size)
    block_x = output_block(s, width)
    block_BC = block_x if block_x < block_p else max(LEAST, triton.next_power_of_2(width))
    parts_x, parts_BC = triton.cdiv(width, block_x), triton.cdiv(width, block_BC)
    grad_delta, grad_D = s.delta.new_empty(2, parts_x, *s.delta.shape)
    grad_B, grad_C = kept.new_empty(2, parts_BC, batch, length, heads, size)
    flow = s.delta.new_empty(parts_BC, *s.delta.shape)
    y_strides, z_strides = grad_y.stride()[:3], (x if z is None else z).stride()[:3]
    common = length, heads, groups, s.chunks
    programs = batch * heads * s.chunks
    with on_device(x):
        _chunk_carries[(programs, triton.cdiv(width, block_p), triton.cdiv(size, block_n))](
            grad_y, x if z is None else z, s.sums, s.documents, C, carries, *common, *y_strides, *z_strides,
            *C.stride()[:3], width, size, chunk_size, s.padded, block_p, block_n,
            z is not None, s.acc, s.dot, s.precision, num_warps=4, **LAUNCH,
        )  # fmt: skip
        pass_states(s, carries, grad_final_state, grad_start, chunk_size, reverse=True)
        _gradients_of_B_and_C[(programs, parts_BC)](
            grad_y, x, s.delta, s.sums, s.documents, B, C, x if z is None else z, kept, carries, grad_B, grad_C, flow,
            *common, *y_strides, *x.stride()[:3], *B.stride()[:3], *C.stride()[:3], *z_strides,
            width, size, chunk_size, s.padded, block_BC, LEAST,
            z is not None, s.acc, s.dot, s.precision, num_warps=8, **LAUNCH,
        )  # fmt: skip
        _gradient_of_x[(programs, parts_x)](
            grad_y, x, s.delta, s.sums, s.documents, B, C, None if D is None else D.contiguous(), x if z is None else z,
            carries, grad_x, grad_delta, grad_D,
            *common, *y_strides, *x.stride()[:3], *B.stride()[:3], *C.stride()[:3], *z_strides,
            width, size, chunk_size, s.padded, block_x, min(32, block_n),
            D is not None, z is not None, s.acc, s.dot, s.precision, num_warps=8, **LAUNCH,
        )  # fmt: skip
        if grad_z is not None:
            chunk_outputs(s, x, B, C, D, z, grad_y, kept, grad_z, chunk_size)
    flow = flow.sum(dim=0)
    grad_raw = torch.addcmul(grad_delta.sum(dim=0), flow, A.to(dtype))
    if dt_softplus:
        grad_raw = grad_raw * torch.sigmoid(s.raw)
    gradients = (
        grad_x,
        grad_raw,
        (flow * s.delta).sum(dim=(0, 1)),
        *(v.unflatten(3, (groups, -1)).sum(dim=(0, 4)) for v in (grad_B, grad_C)),
        None if D is None else grad_D.sum(dim=(0, 1, 2)),
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
