"""The selective scan on the GPU (backend `triton`), forward.

A program walks through the tokens with the states of a few channels in registers, which reads every input once and
takes one exponential for each state and token: those are what limits the scan. Where there are too few channels to fill
the GPU, time is cut into segments. Then each segment is first walked from a state of zero, which gives its end state
and its sum of Δ; `_chain` goes through the segments with the decays exp(A ΣΔ), no quotient is taken; and each is walked
again from the state before it.

The strides in time are constants of the kernels: the offsets of tokens that are loaded together then cost no registers.

Letters: B batch, T length, E channels, N states, J chunks, S segments of whole chunks.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment, var-annotated"

import torch
import triton
import triton.language as tl
from torch import Tensor

from neural_layers.kernels.arguments import accumulation_dtype
from neural_layers.kernels.triton_support import (
    LAUNCH,
    accumulator,
    contiguous,
    multiprocessors,
    on_device,
    rows,
    strides,
)

# Tokens between two states that are kept for the backward pass, half of the bytes of u in bfloat16 where N is 16.
CHUNK = 64
# Bytes of states of a program, 16 to a thread; tokens whose inputs are loaded together, while the ones before are
# computed on, and their number in float64, where registers are short.
STATE_BYTES, TOGETHER, TOGETHER_FLOAT64 = 2048, 8, 2
# Programs to a multiprocessor where time is cut, and the fewest chunks of a segment.
PROGRAMS, LEAST_CHUNKS = 4, 2
# e^x = 2^(x log₂ e): the factor goes into A once, and the exponential is one instruction.
LOG2_E: tl.constexpr = tl.constexpr(1.4426950408889634)


@triton.jit
def softplus(x, ACC: tl.constexpr):
    """log(1 + eˣ), with the relative precision of ACC for small results too, on which the decays depend."""
    e = tl.exp(-tl.abs(x))
    if tl.float64 == ACC:
        w = 1 + e
        tail = tl.log(w) - ((w - 1) - e) / w
    else:
        # 2 artanh(e / (2 + e)): the GPU's logarithm is precise to 2⁻²², not relative to its result.
        s = e / (2 + e)
        q = s * s
        series = 1 / 13 * q + 1 / 11
        series = series * q + 1 / 9
        series = series * q + 1 / 7
        series = series * q + 1 / 5
        series = series * q + 1 / 3
        tail = 2 * s * (series * q + 1)
    return tl.maximum(x, 0.0) + tail


@triton.jit
def load_tokens(x, x_T, t, mask, COUNT: tl.constexpr):
    """Rows t … t + COUNT − 1 of (T, …), each as it is in memory."""
    rows = ()
    x += t * x_T
    for i in tl.static_range(COUNT):
        rows = rows + (tl.load(x + i * x_T, mask, other=0.0),)
    return rows


@triton.jit
def load_borders(seq_idx, seq_T, t, HAS_DOCUMENTS: tl.constexpr, COUNT: tl.constexpr):
    """For each of COUNT tokens whether a document begins with it; the first of all continues its initial state's."""
    borders = ()
    for i in tl.static_range(COUNT):
        if HAS_DOCUMENTS:
            before = tl.load(seq_idx + tl.maximum(t + i - 1, 0) * seq_T)
            borders = borders + ((tl.load(seq_idx + (t + i) * seq_T) != before).to(tl.int32),)
        else:
            borders = borders + (0,)
    return borders


@triton.jit
def step(h, u, raw, B, bias, A, border, SOFTPLUS: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, ACC: tl.constexpr):
    """The state after a token, its decay, u, Δ and delta + bias; A comes times log₂ e."""
    raw = raw.to(ACC) + bias
    d = raw
    if SOFTPLUS:
        d = softplus(raw, ACC)
    u = u.to(ACC)
    if HAS_DOCUMENTS:
        # A fill, not a product with 0: the document before may have left NaN or inf.
        h = tl.where(border != 0, 0.0, h)
    decay = tl.exp2(d[:, None] * A)
    return decay * h + (d * u)[:, None] * B.to(ACC)[None, :], decay, u, d, raw


@triton.jit
def over_states(x, N: tl.constexpr, PAD: tl.constexpr):
    """The sum over the states that exist; the others may be NaN where an input is infinite."""
    if N != PAD:
        x = tl.where((tl.arange(0, PAD) < N)[None, :], x, 0.0)
    return tl.sum(x, axis=1)


@triton.jit
def _walk(
    h, t, inputs, borders, A, D, bias, y, width, exists, N: tl.constexpr, PAD: tl.constexpr, SOFTPLUS: tl.constexpr,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, ACC: tl.constexpr, COUNT: tl.constexpr,
):  # fmt: skip
    """The state after COUNT tokens from t, whose outputs are stored."""
    us, deltas, Bs, Cs, zs = inputs
    for i in tl.static_range(COUNT):
        h, _, u, _, _ = step(h, us[i], deltas[i], Bs[i], bias, A, borders[i], SOFTPLUS, HAS_DOCUMENTS, ACC)
        out = over_states(h * Cs[i].to(ACC)[None, :], N, PAD)
        if HAS_D:
            out += D * u
        if HAS_Z:
            z = zs[i].to(ACC)
            out = out * (z * tl.sigmoid(z))
        tl.store(y + (t + i) * width, out, exists)
    return h


@triton.jit
def _load_inputs(
    t, u, u_T, delta, delta_T, B, B_T, C, C_T, z, z_T, e_mask, n_mask, HAS_Z: tl.constexpr, COUNT: tl.constexpr
):
    zs = ()
    if HAS_Z:
        zs = load_tokens(z, z_T, t, e_mask, COUNT)
    return (
        load_tokens(u, u_T, t, e_mask, COUNT),
        load_tokens(delta, delta_T, t, e_mask, COUNT),
        load_tokens(B, B_T, t, n_mask, COUNT),
        load_tokens(C, C_T, t, n_mask, COUNT),
        zs,
    )


@triton.jit
def _scan(
    u, delta, A, B, C, D, z, bias, start, seq_idx, y, borders, final, length, width: tl.constexpr, segments, segment,
    u_B, u_T: tl.constexpr, delta_B, delta_T: tl.constexpr, B_B, B_T: tl.constexpr, C_B, C_T: tl.constexpr, z_B,
    z_T: tl.constexpr, seq_B, seq_T: tl.constexpr, N: tl.constexpr, PAD: tl.constexpr, SOFTPLUS: tl.constexpr,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_START: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr, KEEP: tl.constexpr, ACC: tl.constexpr, CHUNK: tl.constexpr, TOGETHER: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    """y of a segment of tokens and a block of channels, the states before each chunk, and the final state.

    For each token and channel it reads u, delta, z and writes y, 8 bytes in bfloat16; and 4·N/CHUNK bytes of kept
    states. It takes N exponentials, 3·N multiplications and additions fused or not, and about 40 operations of softplus
    and silu, which the PAD/4 threads that share a channel all do. B and C come from the L2 cache.
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
    D_E = tl.zeros([CHANNELS], ACC)
    bias_E = tl.zeros([CHANNELS], ACC)
    if HAS_D:
        D_E = tl.load(D + e, e_mask, other=0.0).to(ACC)
    if HAS_BIAS:
        bias_E = tl.load(bias + e, e_mask, other=0.0).to(ACC)
    h = tl.zeros([CHANNELS, PAD], ACC)
    if HAS_START:
        h = tl.load(start + program * width * N + tile, mask, other=0.0).to(ACC)

    u += b * u_B + e
    delta += b * delta_B + e
    z += b * z_B + e
    B += b * B_B + n
    C += b * C_B + n
    seq_idx += b * seq_B
    y += b * length * width + e
    borders += b * width * N + tile
    batch_states = tl.num_programs(0) // segments * width * N

    together_end = first + (end - first) // TOGETHER * TOGETHER
    some = first < together_end
    inputs = _load_inputs(
        first, u, u_T, delta, delta_T, B, B_T, C, C_T, z, z_T, e_mask & some, (n < N) & some, HAS_Z, TOGETHER
    )
    for t in range(first, together_end, TOGETHER):
        if KEEP:
            if t % CHUNK == 0:
                tl.store(borders + t // CHUNK * batch_states, h, mask)
        more = t + TOGETHER < together_end
        ahead = _load_inputs(
            t + TOGETHER, u, u_T, delta, delta_T, B, B_T, C, C_T, z, z_T, e_mask & more, (n < N) & more, HAS_Z, TOGETHER
        )
        begins = load_borders(seq_idx, seq_T, t, HAS_DOCUMENTS, TOGETHER)
        h = _walk(
            h, t, inputs, begins, A_EN, D_E, bias_E, y, width, e_mask, N, PAD, SOFTPLUS, HAS_D, HAS_Z, HAS_DOCUMENTS,
            ACC, TOGETHER,
        )  # fmt: skip
        inputs = ahead
    for t in range(together_end, end):
        if KEEP:
            if t % CHUNK == 0:
                tl.store(borders + t // CHUNK * batch_states, h, mask)
        one = _load_inputs(t, u, u_T, delta, delta_T, B, B_T, C, C_T, z, z_T, e_mask, n < N, HAS_Z, 1)
        begins = load_borders(seq_idx, seq_T, t, HAS_DOCUMENTS, 1)
        h = _walk(
            h, t, one, begins, A_EN, D_E, bias_E, y, width, e_mask, N, PAD, SOFTPLUS, HAS_D, HAS_Z, HAS_DOCUMENTS, ACC,
            1,
        )  # fmt: skip

    if end == length:
        tl.store(final + b * width * N + tile, h, mask)
        if KEEP:
            tl.store(borders + (length + CHUNK - 1) // CHUNK * batch_states, h, mask)


@triton.jit
def _summarise(
    u, delta, A, B, bias, seq_idx, ends, sums, unbroken, length, width: tl.constexpr, segments, segment, u_B,
    u_T: tl.constexpr, delta_B, delta_T: tl.constexpr, B_B, B_T: tl.constexpr, seq_B, seq_T: tl.constexpr,
    N: tl.constexpr, PAD: tl.constexpr, SOFTPLUS: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_DOCUMENTS: tl.constexpr,
    ACC: tl.constexpr, TOGETHER: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The state after a segment from zero before it, its sum of Δ, and whether no document begins in it.

    Reads u and delta, 4 bytes in bfloat16 for each token and channel, for N exponentials and 2·N other operations.
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
    h = tl.zeros([CHANNELS, PAD], ACC)
    sum_E = tl.zeros([CHANNELS], ACC)
    broken = tl.full([], 0, tl.int32)
    u += b * u_B + e
    delta += b * delta_B + e
    B += b * B_B + n
    seq_idx += b * seq_B
    for t in range(first, first + (end - first) // TOGETHER * TOGETHER, TOGETHER):
        us = load_tokens(u, u_T, t, e_mask, TOGETHER)
        deltas = load_tokens(delta, delta_T, t, e_mask, TOGETHER)
        Bs = load_tokens(B, B_T, t, n < N, TOGETHER)
        begins = load_borders(seq_idx, seq_T, t, HAS_DOCUMENTS, TOGETHER)
        for i in tl.static_range(TOGETHER):
            h, _, _, d, _ = step(h, us[i], deltas[i], Bs[i], bias_E, A_EN, begins[i], SOFTPLUS, HAS_DOCUMENTS, ACC)
            sum_E += d
            broken = broken | begins[i]
    # A segment that is not the last has whole groups of tokens, and nothing reads the end state of the last one.
    tl.store(ends + program * width * N + tile, h, mask)
    tl.store(sums + program * width + e, sum_E, e_mask)
    tl.store(unbroken + program, (broken == 0).to(tl.int32), tl.program_id(1) == 0)


@triton.jit
def chain(
    A, start, ends, sums, unbroken, width, segments, N: tl.constexpr, PAD: tl.constexpr, HAS_START: tl.constexpr,
    REVERSE: tl.constexpr, ACC: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """In place of what each segment makes of zero, what is before it: the state, or with REVERSE the gradient after it.

    Reads and writes 8·N bytes for each segment and channel, for N exponentials.
    """
    b = tl.program_id(0).to(tl.int64)
    e = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    n = tl.arange(0, PAD)
    mask = (e < width)[:, None] & (n < N)[None, :]
    tile = e[:, None] * N + n[None, :]
    A_EN = tl.load(A + tile, mask, other=0.0).to(ACC) * LOG2_E
    h = tl.zeros([CHANNELS, PAD], ACC)
    if HAS_START:
        h = tl.load(start + b * width * N + tile, mask, other=0.0).to(ACC)
    for i in range(segments):
        s = segments - 1 - i if REVERSE else i
        at = b * segments + s
        own = tl.load(ends + at * width * N + tile, mask, other=0.0)
        sum_E = tl.load(sums + at * width + e, e < width, other=0.0)
        kept = (tl.load(unbroken + at) != 0) & (h != 0)
        tl.store(ends + at * width * N + tile, h, mask)
        # What is 0 stays 0, also where the decays of a growing state overflow.
        h = tl.where(kept, tl.exp2(sum_E[:, None] * A_EN) * h, 0.0) + own


def forward(
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
    keep_borders: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, T, E), the final state (B, E, N), and the states at the borders of the chunks (J + 1, B, E, N) if kept."""
    given = (u, delta, A, B, C, D, z, delta_bias, initial_state)
    dtype, acc = accumulation_dtype(*given), accumulator(*given)
    (batch, length, width), states = u.shape, A.shape[1]
    y, final = u.new_empty(u.shape), u.new_empty(batch, width, states, dtype=dtype)
    kept = triton.cdiv(length, CHUNK) + 1 if keep_borders else 0
    borders = final.new_empty(kept, batch, width, states)
    if length == 0:
        for state in (final, *borders):
            state.zero_() if initial_state is None else state.copy_(initial_state)
    if y.numel() == 0:
        return y, final, borders
    u, delta, B, C, z, A = rows(u), rows(delta), rows(B), rows(C), rows(z), A.contiguous()
    D, delta_bias, start = contiguous(D, delta_bias, initial_state)
    block, pad, warps = channel_block(width, states, dtype)
    blocks = triton.cdiv(width, block)
    segments, segment = cut(batch * blocks, length, u.device)
    flags = delta_softplus, D is not None, z is not None, delta_bias is not None
    with on_device(u):
        if segments > 1:
            start = _starts(u, delta, A, B, delta_bias, start, seq_idx, delta_softplus, segments, segment, final)
        _scan[(batch * segments, blocks)](
            u, delta, A, B, C, D, u if z is None else z, delta_bias, start, u if seq_idx is None else seq_idx, y,
            borders, final, length, width, segments, segment, *u.stride()[:2], *delta.stride()[:2], *B.stride()[:2],
            *C.stride()[:2], *strides(z, 2), *strides(seq_idx, 2), states, pad, *flags, start is not None,
            seq_idx is not None, keep_borders, acc, CHUNK, tokens_together(dtype), block, num_warps=warps, **LAUNCH,
        )  # fmt: skip
    return y, final, borders


def _starts(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    delta_softplus: bool,
    segments: int,
    segment: int,
    like: Tensor,
) -> Tensor:
    """The states before each segment (B, S, E, N)."""
    (batch, length, width), states, acc = u.shape, A.shape[1], accumulator(like)
    block, pad, warps = channel_block(width, states, like.dtype)
    blocks = triton.cdiv(width, block)
    ends, sums = like.new_empty(batch, segments, width, states), like.new_empty(batch, segments, width)
    unbroken = u.new_empty(batch, segments, dtype=torch.int32)
    _summarise[(batch * segments, blocks)](
        u, delta, A, B, delta_bias, u if seq_idx is None else seq_idx, ends, sums, unbroken, length, width, segments,
        segment, *u.stride()[:2], *delta.stride()[:2], *B.stride()[:2], *strides(seq_idx, 2), states, pad,
        delta_softplus, delta_bias is not None, seq_idx is not None, acc, tokens_together(like.dtype), block,
        num_warps=warps, **LAUNCH,
    )  # fmt: skip
    chain[(batch, blocks)](
        A, initial_state, ends, sums, unbroken, width, segments, states, pad, initial_state is not None, False, acc,
        block, num_warps=warps, **LAUNCH,
    )  # fmt: skip
    return ends


def channel_block(width: int, states: int, dtype: torch.dtype) -> tuple[int, int, int]:
    """Channels of a program, its states with those that only fill up a power of two, and its warps."""
    pad = triton.next_power_of_2(max(states, 1))
    block = min(triton.next_power_of_2(width), max(1, STATE_BYTES // (pad * dtype.itemsize)))
    return block, pad, max(1, min(4, block * pad * dtype.itemsize // 512))


def tokens_together(dtype: torch.dtype) -> int:
    """Tokens whose inputs are loaded together."""
    return TOGETHER_FLOAT64 if dtype == torch.float64 else TOGETHER


def cut(programs: int, length: int, device: torch.device) -> tuple[int, int]:
    """The number of segments of time and the tokens of each, for so many programs that walk through all of time.

    To walk twice costs twice the exponentials: it pays only where a quarter of the processors had nothing to do.
    """
    processors, chunks = multiprocessors(device), triton.cdiv(length, CHUNK)
    if 4 * programs >= 3 * processors:
        return 1, length
    wanted = min(triton.cdiv(PROGRAMS * processors, programs), max(1, chunks // LEAST_CHUNKS))
    segment = triton.cdiv(chunks, wanted) * CHUNK
    return triton.cdiv(length, segment), segment
