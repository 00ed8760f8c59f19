"""The gradients of the selective scan on the GPU (backend `triton`), by recomputation from the states at chunk borders.

With g_t the gradient of h_t and G_t the gradient of C_t·h_t + D u_t:

    g_t = C_t G_t + exp(Δ_{t+1} A) g_{t+1}                     dC_t = Σ_E G_t h_t      dB_t = Σ_E g_t Δ_t u_t
    dΔ_t = Σ_N g_t exp(Δ_t A) h_{t−1} A + u_t Σ_N g_t B_t      dA = Σ_t g_t exp(Δ_t A) h_{t−1} Δ_t
    du_t = Δ_t Σ_N g_t B_t + D G_t

A program goes through the chunks of a few channels from the last to the first. Each chunk is walked forward from its
kept state, and a state every few tokens noted; then these few tokens, the last first, are walked forward once more with
their states in registers, and backward. As in the forward pass, time is cut into segments where there are too few
channels; the gradient that enters a segment at its end then comes from the same `chain`.

The gradients of B and C are sums over the channels of a program, which torch adds; those of A, D and the bias are sums
over its tokens: no atomics, and the same bits from every run.

Letters: B batch, T length, E channels, N states, J chunks, S segments, P blocks of channels.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment, var-annotated"

import torch
import triton
import triton.language as tl
from torch import Tensor

from neural_layers.kernels.selective_scan import triton_forward
from neural_layers.kernels.selective_scan.triton_forward import (
    LOG2_E,
    chain,
    channel_block,
    cut,
    load_borders,
    load_tokens,
    over_states,
    softplus,
    step,
)
from neural_layers.kernels.triton_support import LAUNCH, accumulator, contiguous, on_device, rows, strides

# Tokens whose states and decays are in registers together: as many as do not spill.
TOGETHER, TOGETHER_PACKED, TOGETHER_FLOAT64 = 4, 3, 2
LN_2: tl.constexpr = tl.constexpr(0.6931471805599453)


@triton.jit
def _through_gate(grad_y, z, HAS_Z: tl.constexpr, ACC: tl.constexpr):
    """The gradient of what is gated, and the factor of that of z."""
    grad = grad_y.to(ACC)
    slope = grad
    if HAS_Z:
        z = z.to(ACC)
        s = tl.sigmoid(z)
        slope = grad * s * (1 + z * (1 - s))
        grad = grad * z * s
    return grad, slope


@triton.jit
def _note_states(
    h, noted, first, end, u, u_T, delta, delta_T, B, B_T, seq_idx, seq_T, A, bias, e_mask, n_mask, mask, note_size,
    SOFTPLUS: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, ACC: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """Walk from first to end, and note the state before every COUNT tokens."""
    for t in range(first, end, COUNT):
        tl.store(noted + (t - first) // COUNT * note_size, h, mask)
        us = load_tokens(u, u_T, t, e_mask, COUNT)
        deltas = load_tokens(delta, delta_T, t, e_mask, COUNT)
        Bs = load_tokens(B, B_T, t, n_mask, COUNT)
        begins = load_borders(seq_idx, seq_T, t, HAS_DOCUMENTS, COUNT)
        for i in tl.static_range(COUNT):
            h, _, _, _, _ = step(h, us[i], deltas[i], Bs[i], bias, A, begins[i], SOFTPLUS, HAS_DOCUMENTS, ACC)
    return h


@triton.jit
def _walk_back(
    t, h, carry, sums, A, D, bias, e_mask, n_mask, grad_y, y_T, u, u_T, delta, delta_T, B, B_T, C, C_T, z, z_T, seq_idx,
    seq_T, grad_u, grad_delta, grad_z, grad_B, grad_C, width, N: tl.constexpr, PAD: tl.constexpr,
    SOFTPLUS: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, ACC: tl.constexpr,
    COUNT: tl.constexpr,
):  # fmt: skip
    """Store the gradients of COUNT tokens from t, given the state before them and the gradient of the one after.

    Returns the gradient of the state before, and the sums over time.
    """
    us = load_tokens(u, u_T, t, e_mask, COUNT)
    deltas = load_tokens(delta, delta_T, t, e_mask, COUNT)
    grads = load_tokens(grad_y, y_T, t, e_mask, COUNT)
    Bs = load_tokens(B, B_T, t, n_mask, COUNT)
    Cs = load_tokens(C, C_T, t, n_mask, COUNT)
    zs = grads
    if HAS_Z:
        zs = load_tokens(z, z_T, t, e_mask, COUNT)
    begins = load_borders(seq_idx, seq_T, t, HAS_DOCUMENTS, COUNT)
    states = (h,)
    decays = ()
    for i in tl.static_range(COUNT):
        h, decay, _, _, _ = step(h, us[i], deltas[i], Bs[i], bias, A, begins[i], SOFTPLUS, HAS_DOCUMENTS, ACC)
        states = states + (h,)
        decays = decays + (decay,)

    grad_u += t * width
    grad_delta += t * width
    grad_z += t * width
    grad_B += t * N
    grad_C += t * N
    sum_A, sum_D, sum_bias = sums
    for i in tl.static_range(COUNT - 1, -1, -1):
        u_E = us[i].to(ACC)
        raw = deltas[i].to(ACC) + bias
        d = raw
        if SOFTPLUS:
            d = softplus(raw, ACC)
        grad, slope = _through_gate(grads[i], zs[i], HAS_Z, ACC)
        B_N = Bs[i].to(ACC)[None, :]
        C_N = Cs[i].to(ACC)[None, :]
        after = states[i + 1]
        before = states[i]
        if HAS_Z:
            out = over_states(after * C_N, N, PAD)
            if HAS_D:
                out += D * u_E
            tl.store(grad_z + i * width, slope * out, e_mask)
        tl.store(grad_C + i * N, tl.sum(grad[:, None] * after, axis=0), n_mask)
        g = carry + grad[:, None] * C_N
        tl.store(grad_B + i * N, tl.sum(g * (d * u_E)[:, None], axis=0), n_mask)
        grad_drive = over_states(g * B_N, N, PAD)
        carry = g * decays[i]
        if HAS_DOCUMENTS:
            # Fills, not products with 0: either document may have NaN or inf to say.
            carry = tl.where(begins[i] != 0, 0.0, carry)
            before = tl.where(begins[i] != 0, 0.0, before)
        through_decay = carry * before
        grad_d = over_states(through_decay * A, N, PAD) * LN_2 + grad_drive * u_E
        sum_A += through_decay * d[:, None]
        if SOFTPLUS:
            grad_d = grad_d * tl.sigmoid(raw)
        tl.store(grad_delta + i * width, grad_d, e_mask)
        sum_bias += grad_d
        out_u = d * grad_drive
        if HAS_D:
            out_u += D * grad
            sum_D += grad * u_E
        tl.store(grad_u + i * width, out_u, e_mask)
    return carry, (sum_A, sum_D, sum_bias)


@triton.jit
def _scan_backward(
    grad_y, carries, borders, u, delta, A, B, C, D, z, bias, seq_idx, noted, grad_u, grad_delta, grad_A, grad_B, grad_C,
    grad_D, grad_z, grad_bias, grad_start, length, width: tl.constexpr, segments, segment, y_B, y_T: tl.constexpr, u_B,
    u_T: tl.constexpr, delta_B, delta_T: tl.constexpr, B_B, B_T: tl.constexpr, C_B, C_T: tl.constexpr, z_B,
    z_T: tl.constexpr, seq_B, seq_T: tl.constexpr, N: tl.constexpr, PAD: tl.constexpr, SOFTPLUS: tl.constexpr,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_CARRY: tl.constexpr, HAS_START: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr, ACC: tl.constexpr, CHUNK: tl.constexpr, NOTES: tl.constexpr, TOGETHER: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    """The gradients of a segment of tokens and a block of channels.

    For each token and channel it reads u, delta, z and grad_y, u and delta twice, and writes three gradients, 18 bytes
    in bfloat16; 8·N/CHANNELS bytes of the parts of grad_B and grad_C; and 8·N/TOGETHER bytes of noted states, which
    stay in the L2 cache. It takes 2·N exponentials and about 20·N other operations, and two sums over channels for each
    token.
    """
    program = tl.program_id(0).to(tl.int64)
    b = program // segments
    first = (program - b * segments) * segment
    end = tl.minimum(first + segment, length)
    e = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    n = tl.arange(0, PAD)
    e_mask = e < width
    n_mask = n < N
    mask = e_mask[:, None] & n_mask[None, :]
    tile = e[:, None] * N + n[None, :]
    A_EN = tl.load(A + tile, mask, other=0.0).to(ACC) * LOG2_E
    D_E = tl.zeros([CHANNELS], ACC)
    bias_E = tl.zeros([CHANNELS], ACC)
    if HAS_D:
        D_E = tl.load(D + e, e_mask, other=0.0).to(ACC)
    if HAS_BIAS:
        bias_E = tl.load(bias + e, e_mask, other=0.0).to(ACC)
    carry = tl.zeros([CHANNELS, PAD], ACC)
    if HAS_CARRY:
        carry = tl.load(carries + program * width * N + tile, mask, other=0.0).to(ACC)

    u += b * u_B + e
    delta += b * delta_B + e
    z += b * z_B + e
    grad_y += b * y_B + e
    B += b * B_B + n
    C += b * C_B + n
    seq_idx += b * seq_B
    grad_u += b * length * width + e
    grad_delta += b * length * width + e
    grad_z += b * length * width + e
    batch = tl.num_programs(0) // segments
    grad_B += (tl.program_id(1) * batch + b) * length * N + n
    grad_C += (tl.program_id(1) * batch + b) * length * N + n
    borders += b * width * N + tile
    noted += program * NOTES * width * N + tile
    sums = (tl.zeros([CHANNELS, PAD], ACC), tl.zeros([CHANNELS], ACC), tl.zeros([CHANNELS], ACC))

    chunks = (end - first + CHUNK - 1) // CHUNK
    for j in range(chunks):
        start = first + (chunks - 1 - j) * CHUNK
        stop = tl.minimum(start + CHUNK, end)
        singles = start + (stop - start) // TOGETHER * TOGETHER
        h = tl.load(borders + start // CHUNK * batch * width * N, mask, other=0.0)
        h = _note_states(
            h, noted, start, singles, u, u_T, delta, delta_T, B, B_T, seq_idx, seq_T, A_EN, bias_E, e_mask, n_mask,
            mask, width * N, SOFTPLUS, HAS_DOCUMENTS, ACC, TOGETHER,
        )  # fmt: skip
        single_notes = noted + CHUNK // TOGETHER * width * N
        _note_states(
            h, single_notes, singles, stop, u, u_T, delta, delta_T, B, B_T, seq_idx, seq_T, A_EN, bias_E, e_mask,
            n_mask, mask, width * N, SOFTPLUS, HAS_DOCUMENTS, ACC, 1,
        )  # fmt: skip
        # What one thread noted, another may read.
        tl.debug_barrier()
        for i in range(stop - singles):
            t = stop - 1 - i
            h = tl.load(single_notes + (t - singles) * width * N, mask, other=0.0)
            carry, sums = _walk_back(
                t, h, carry, sums, A_EN, D_E, bias_E, e_mask, n_mask, grad_y, y_T, u, u_T, delta, delta_T, B, B_T, C,
                C_T, z, z_T, seq_idx, seq_T, grad_u, grad_delta, grad_z, grad_B, grad_C, width, N, PAD, SOFTPLUS, HAS_D,
                HAS_Z, HAS_DOCUMENTS, ACC, 1,
            )  # fmt: skip
        for i in range((singles - start) // TOGETHER):
            t = singles - (i + 1) * TOGETHER
            h = tl.load(noted + (t - start) // TOGETHER * width * N, mask, other=0.0)
            carry, sums = _walk_back(
                t, h, carry, sums, A_EN, D_E, bias_E, e_mask, n_mask, grad_y, y_T, u, u_T, delta, delta_T, B, B_T, C,
                C_T, z, z_T, seq_idx, seq_T, grad_u, grad_delta, grad_z, grad_B, grad_C, width, N, PAD, SOFTPLUS, HAS_D,
                HAS_Z, HAS_DOCUMENTS, ACC, TOGETHER,
            )  # fmt: skip
        tl.debug_barrier()

    sum_A, sum_D, sum_bias = sums
    tl.store(grad_A + program * width * N + tile, sum_A, mask)
    if HAS_D:
        tl.store(grad_D + program * width + e, sum_D, e_mask)
    if HAS_BIAS:
        tl.store(grad_bias + program * width + e, sum_bias, e_mask)
    if HAS_START:
        tl.store(grad_start + b * width * N + tile, carry, mask & (first == 0))


@triton.jit
def _summarise_backward(
    grad_y, delta, A, C, z, bias, seq_idx, carries, sums, unbroken, length, width: tl.constexpr, segments, segment, y_B,
    y_T: tl.constexpr, delta_B, delta_T: tl.constexpr, C_B, C_T: tl.constexpr, z_B, z_T: tl.constexpr, seq_B,
    seq_T: tl.constexpr, N: tl.constexpr, PAD: tl.constexpr, SOFTPLUS: tl.constexpr, HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, ACC: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The gradient of the state before a segment where that after it is zero, its sum of Δ, and whether it is unbroken.

    Reads grad_y, delta and z, 6 bytes in bfloat16 for each token and channel, for N exponentials and 2·N other
    operations.
    """
    program = tl.program_id(0).to(tl.int64)
    b = program // segments
    first = (program - b * segments) * segment
    end = tl.minimum(first + segment, length)
    e = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    n = tl.arange(0, PAD)
    e_mask = e < width
    mask = e_mask[:, None] & (n < N)[None, :]
    tile = e[:, None] * N + n[None, :]
    A_EN = tl.load(A + tile, mask, other=0.0).to(ACC) * LOG2_E
    bias_E = tl.zeros([CHANNELS], ACC)
    if HAS_BIAS:
        bias_E = tl.load(bias + e, e_mask, other=0.0).to(ACC)
    carry = tl.zeros([CHANNELS, PAD], ACC)
    sum_E = tl.zeros([CHANNELS], ACC)
    broken = tl.full([], 0, tl.int32)
    for i in range(end - first):
        t = end - 1 - i
        raw = tl.load(delta + b * delta_B + t * delta_T + e, e_mask, other=0.0).to(ACC) + bias_E
        grad = tl.load(grad_y + b * y_B + t * y_T + e, e_mask, other=0.0)
        z_E = grad
        if HAS_Z:
            z_E = tl.load(z + b * z_B + t * z_T + e, e_mask, other=0.0)
        C_N = tl.load(C + b * C_B + t * C_T + n, n < N, other=0.0).to(ACC)
        (begins,) = load_borders(seq_idx + b * seq_B, seq_T, t, HAS_DOCUMENTS, 1)
        grad, _ = _through_gate(grad, z_E, HAS_Z, ACC)
        if SOFTPLUS:
            raw = softplus(raw, ACC)
        carry = (carry + grad[:, None] * C_N[None, :]) * tl.exp2(raw[:, None] * A_EN)
        if HAS_DOCUMENTS:
            carry = tl.where(begins != 0, 0.0, carry)
        broken = broken | begins
        sum_E += raw
    tl.store(carries + program * width * N + tile, carry, mask)
    tl.store(sums + program * width + e, sum_E, e_mask)
    tl.store(unbroken + program, (broken == 0).to(tl.int32), tl.program_id(1) == 0)


def backward(
    grad_y: Tensor,
    grad_final_state: Tensor | None,
    borders: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    delta_softplus: bool,
) -> list[Tensor]:
    """The gradients of u, delta, A, B, C, and of D, z, delta_bias, initial_state where given."""
    (batch, length, width), states, acc = u.shape, A.shape[1], accumulator(borders)
    grad_u, grad_delta = u.new_empty(u.shape), delta.new_empty(delta.shape)
    grad_z = None if z is None else z.new_empty(z.shape)
    grad_start = None if initial_state is None else initial_state.new_empty(initial_state.shape)
    carry = None if grad_final_state is None else grad_final_state.contiguous()
    if length == 0 and grad_start is not None:
        grad_start.zero_() if carry is None else grad_start.copy_(carry)
    block, pad, warps = channel_block(width, states, borders.dtype) if width else (1, 1, 1)
    # One state to a thread: two of float64, with their decays, would spill.
    warps *= 2 if borders.dtype == torch.float64 else 1
    blocks = triton.cdiv(width, block)
    programs_of = cut(batch * blocks, length, u.device) if grad_u.numel() else (1, 0)
    segments, segment = programs_of
    parts_A, parts_D = borders.new_empty(batch * segments, width, states), borders.new_empty(2, batch * segments, width)
    parts_B = borders.new_empty(2, blocks, batch, length, states)
    if grad_u.numel():
        u, delta, B, C, z, grad_y, A = rows(u), rows(delta), rows(B), rows(C), rows(z), rows(grad_y), A.contiguous()
        D, delta_bias = contiguous(D, delta_bias)
        together = TOGETHER if seq_idx is None else TOGETHER_PACKED
        together = TOGETHER_FLOAT64 if borders.dtype == torch.float64 else together
        notes = triton_forward.CHUNK // together + together - 1
        noted = borders.new_empty(batch * segments, notes, width, states)
        z_or_u, seq_idx_or_u = u if z is None else z, u if seq_idx is None else seq_idx
        with on_device(u):
            if segments > 1:
                carry = _carries(
                    grad_y, carry, delta, A, C, z, delta_bias, seq_idx, delta_softplus, segments, segment, borders
                )
            _scan_backward[(batch * segments, blocks)](
                grad_y, carry, borders, u, delta, A, B, C, D, z_or_u, delta_bias, seq_idx_or_u, noted, grad_u,
                grad_delta, parts_A, *parts_B, parts_D[0], grad_u if grad_z is None else grad_z, parts_D[1], grad_start,
                length, width, segments, segment, *grad_y.stride()[:2], *u.stride()[:2], *delta.stride()[:2],
                *B.stride()[:2], *C.stride()[:2], *strides(z, 2), *strides(seq_idx, 2), states, pad, delta_softplus,
                D is not None, z is not None, delta_bias is not None, carry is not None, grad_start is not None,
                seq_idx is not None, acc, triton_forward.CHUNK, notes, together, block, num_warps=warps, **LAUNCH,
            )  # fmt: skip
    else:
        parts_A.zero_(), parts_D.zero_(), parts_B.zero_()
    sum_B, sum_C = parts_B.sum(dim=1)
    gradients = [grad_u, grad_delta, parts_A.sum(dim=0).to(A.dtype), _own(sum_B, B), _own(sum_C, C)]
    gradients += [] if D is None else [parts_D[0].sum(dim=0).to(D.dtype)]
    gradients += [] if grad_z is None else [grad_z]
    gradients += [] if delta_bias is None else [parts_D[1].sum(dim=0).to(delta_bias.dtype)]
    return gradients if grad_start is None else [*gradients, grad_start]


def _own(gradient: Tensor, of: Tensor) -> Tensor:
    """In the dtype of its input, and sharing memory with no other output."""
    return gradient.to(of.dtype, copy=True)


def _carries(
    grad_y: Tensor,
    grad_final_state: Tensor | None,
    delta: Tensor,
    A: Tensor,
    C: Tensor,
    z: Tensor | None,
    delta_bias: Tensor | None,
    seq_idx: Tensor | None,
    delta_softplus: bool,
    segments: int,
    segment: int,
    like: Tensor,
) -> Tensor:
    """The gradients of the states after each segment (B, S, E, N)."""
    (batch, length, width), states, acc = delta.shape, A.shape[1], accumulator(like)
    block, pad, warps = channel_block(width, states, like.dtype)
    blocks = triton.cdiv(width, block)
    carries, sums = like.new_empty(batch, segments, width, states), like.new_empty(batch, segments, width)
    unbroken = delta.new_empty(batch, segments, dtype=torch.int32)
    _summarise_backward[(batch * segments, blocks)](
        grad_y, delta, A, C, grad_y if z is None else z, delta_bias, grad_y if seq_idx is None else seq_idx, carries,
        sums, unbroken, length, width, segments, segment, *grad_y.stride()[:2], *delta.stride()[:2], *C.stride()[:2],
        *strides(z, 2), *strides(seq_idx, 2), states, pad, delta_softplus, z is not None, delta_bias is not None,
        seq_idx is not None, acc, block, num_warps=warps, **LAUNCH,
    )  # fmt: skip
    chain[(batch, blocks)](
        A, grad_final_state, carries, sums, unbroken, width, segments, states, pad, grad_final_state is not None, True,
        acc, block, num_warps=warps, **LAUNCH,
    )  # fmt: skip
    return carries
