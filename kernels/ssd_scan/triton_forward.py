"""The Mamba-2 scan in its matrix form on the GPU (backend `triton`), forward.

With s_t the sum of Δ A from the start of a chunk to its token t, and h the state before the chunk:

    y_t = Σ_{s ≤ t} e^{s_t − s_s} (C_t·B_s) Δ_s x_s  +  e^{s_t} h C_t  +  D x_t
    h'  = e^{s_end} h  +  Σ_s e^{s_end − s_s} Δ_s x_s B_sᵀ

Three kernels: what the tokens of each chunk add to the state after it, all chunks at once; the states, chunk after
chunk; the outputs, all chunks at once. A token counts for another, or for a state, only in its own document: their
factor is filled with 0 where they are of different ones.

Letters: B batch, T length, J chunks, H heads, G groups, P head width, N state size; in kernels C the tokens of a chunk.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from dataclasses import dataclass

import torch
import torch.nn.functional
import triton
import triton.language as tl
from torch import Tensor

from neural_layers.kernels.arguments import accumulation_dtype, document_numbers
from neural_layers.kernels.selective_scan_step.reference import SOFTPLUS_THRESHOLD
from neural_layers.kernels.triton_support import LAUNCH, accumulator, on_device, rows, strides

# The smallest side of a matrix product, and the most columns of one in a program.
LEAST, COLUMNS = 16, 64
# Smaller decays than e^LOWEST are taken for it; a bounded sum of them has no difference of infinities.
LOWEST = {torch.float32: -80.0, torch.float64: -700.0}


@triton.jit
def dot(left, right, total, DOT: tl.constexpr, PRECISION: tl.constexpr):
    """total + left @ right, with both rounded to DOT."""
    return tl.dot(left.to(DOT), right.to(DOT), total, input_precision=PRECISION, out_dtype=total.dtype)


@triton.jit
def all_finite(x):
    """Whether a matrix has neither NaN nor infinity."""
    return tl.sum(tl.sum(x * 0.0, axis=1), axis=0) == 0.0


@triton.jit
def finite(x):
    """x with 0 in place of NaN and infinity, which in a product of matrices would reach what does not see them."""
    return tl.where(x * 0.0 == 0.0, x, 0.0)


@triton.jit
def spoil(out, right, mask, d, C: tl.constexpr, LATER: tl.constexpr):
    """Store NaN at `out` where a token sees one whose row of `right` is not finite in that column.

    It sees those of its document d that are not later, with LATER those that are not earlier. Products are taken of
    `finite` factors, and this is called after them and after a barrier only where something was not finite: so the
    registers are free, and the usual case has no second product.
    """
    c = tl.arange(0, C)
    for k in range(C):
        spoilt = tl.sum(tl.where((c == k)[:, None] & (right * 0.0 != 0.0), 1, 0), axis=0) > 0
        of_document = d == tl.sum(tl.where(c == k, d, 0), axis=0)
        sees = of_document & (c <= k) if LATER else of_document & (c >= k)
        tl.store(out, float("nan"), mask & sees[:, None] & spoilt[None, :])


@triton.jit
def dot_of_rows(
    left, right, exists, N: tl.constexpr, C: tl.constexpr, NS: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """left @ rightᵀ, of the rows of length N to which these point.

    One product to a loop: of products that share a factor Triton gives an Ampere GPU's the rows to the warps, and of 64
    rows to 8 warps each twice, for twice the registers.
    """
    total = tl.zeros([C, C], ACC)
    for first in range(0, N, NS):
        n = first + tl.arange(0, NS)
        mask = exists[:, None] & (n < N)[None, :]
        left_CN = tl.load(left + n[None, :], mask, other=0.0).to(ACC)
        right_CN = tl.load(right + n[None, :], mask, other=0.0).to(ACC)
        total = dot(left_CN, tl.trans(right_CN), total, DOT, PRECISION)
    return total


@triton.jit
def decay(log, lives, ACC: tl.constexpr):
    """e^log where `lives`, otherwise 0; the difference of two sums is taken in float64, and only then rounded."""
    return tl.where(lives, tl.exp(tl.where(lives, log, 0.0).to(ACC)), 0.0)


@triton.jit
def load_chunk(sums, documents, b, h, j, length, heads, CHUNK: tl.constexpr, C: tl.constexpr):
    """The tokens of a chunk, which of them exist, their sums of Δ A and documents; and those of the end and before."""
    c = tl.arange(0, C)
    t = j * CHUNK + c
    exists = (c < CHUNK) & (t < length)
    last = tl.minimum((j + 1) * CHUNK, length) - 1
    s = tl.load(sums + (b * length + t) * heads + h, exists, other=0.0)
    s_end = tl.load(sums + (b * length + last) * heads + h)
    d = tl.load(documents + b * length + t, exists, other=-1)
    d_end = tl.load(documents + b * length + last)
    d_before = tl.load(documents + b * length + tl.maximum(j * CHUNK - 1, 0))
    return t, exists, s, s_end, d, d_end, d_before


@triton.jit
def _chunk_states(
    x, delta, sums, documents, B, out, length, heads, groups, chunks, x_B, x_T, x_H, B_B, B_T, B_G,
    P: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr, C: tl.constexpr, PS: tl.constexpr, NS: tl.constexpr,
    ACC: tl.constexpr, DOT: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Σ_s e^{s_end − s_s} Δ_s x_s B_sᵀ, a block of (P, N) of one chunk and head.

    Reads x and B and writes a state: 2·(P + N) bytes a token and head in bfloat16 and 4·P·N/CHUNK, for 2·P·N
    operations.
    """
    program = tl.program_id(0).to(tl.int64)
    j = program % chunks
    h = program // chunks % heads
    b = program // chunks // heads
    g = h // (heads // groups)
    t, exists, s, s_end, d, d_end, _ = load_chunk(sums, documents, b, h, j, length, heads, CHUNK, C)
    p = tl.program_id(1) * PS + tl.arange(0, PS)
    n = tl.program_id(2) * NS + tl.arange(0, NS)
    factor = decay(s_end - s, exists & (d == d_end), ACC)
    factor = factor * tl.load(delta + (b * length + t) * heads + h, exists, other=0.0)
    x_PC = tl.load(
        x + b * x_B + t[None, :] * x_T + h * x_H + p[:, None], exists[None, :] & (p < P)[:, None], other=0.0
    ).to(ACC)
    B_CN = tl.load(B + b * B_B + t[:, None] * B_T + g * B_G + n[None, :], exists[:, None] & (n < N)[None, :], other=0.0)
    # A fill, not a product with 0: the document before may hold NaN or inf.
    x_PC = tl.where((d == d_end)[None, :], x_PC * factor[None, :], 0.0)
    B_CN = tl.where((d == d_end)[:, None], B_CN.to(ACC), 0.0)
    state = dot(x_PC, B_CN, tl.zeros([PS, NS], ACC), DOT, PRECISION)
    out += ((j * (tl.num_programs(0) // chunks // heads) + b) * heads + h) * P * N
    tl.store(out + p[:, None] * N + n[None, :], state, (p < P)[:, None] & (n < N)[None, :])


@triton.jit
def _pass_states(
    states, start, final, sums, documents, length, heads, chunks, rows,
    SIZE: tl.constexpr, CHUNK: tl.constexpr, REVERSE: tl.constexpr, HAS_START: tl.constexpr, ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """In place of what each chunk adds, what is before it: the state, or with REVERSE the gradient after it.

    Reads and writes each state once: 8·P·N/CHUNK bytes a token and head in float32, for 2 operations an element.
    """
    row = tl.program_id(0).to(tl.int64)
    b = row // heads
    h = row % heads
    i = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    state = tl.zeros([BLOCK], ACC)
    if HAS_START:
        state = tl.load(start + row * SIZE + i, i < SIZE, other=0.0).to(ACC)
    for k in range(chunks):
        j = chunks - 1 - k if REVERSE else k
        last = tl.minimum((j + 1) * CHUNK, length) - 1
        lives = tl.load(documents + b * length + last) == tl.load(documents + b * length + tl.maximum(j * CHUNK - 1, 0))
        factor = tl.exp(tl.load(sums + (b * length + last) * heads + h).to(ACC))
        at = states + (j * rows + row) * SIZE + i
        own = tl.load(at, i < SIZE, other=0.0)
        tl.store(at, state, i < SIZE)
        state = tl.where(lives, factor * state, 0.0) + own
    tl.store(final + row * SIZE + i, state, i < SIZE)


@triton.jit
def _chunk_outputs(
    x, delta, sums, documents, B, C, D, z, grad_y, states, y, length, heads, groups, chunks,
    x_B, x_T, x_H, B_B, B_T, B_G, C_B, C_T, C_G, z_B, z_T, z_H, y_B, y_T, y_H,
    P: tl.constexpr, N: tl.constexpr, CHUNK: tl.constexpr, CS: tl.constexpr, PS: tl.constexpr, NS: tl.constexpr,
    HAS_D: tl.constexpr, HAS_Z: tl.constexpr, HAS_GRADIENT: tl.constexpr, ACC: tl.constexpr, DOT: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """The outputs of one chunk and head, PS columns of them; or given the gradient of the outputs, that of z.

    Reads x, z, B, C and the state, writes y: 6·P + 4·N bytes a token and head in bfloat16 and 4·P·N/CHUNK, for
    2·(CHUNK·N + CHUNK·P + N·P) operations. B, C come from the L2 cache for all heads of a group but one.
    """
    program = tl.program_id(0).to(tl.int64)
    j = program % chunks
    h = program // chunks % heads
    b = program // chunks // heads
    g = h // (heads // groups)
    t, exists, s, _, d, _, d_before = load_chunk(sums, documents, b, h, j, length, heads, CHUNK, CS)
    p = tl.program_id(1) * PS + tl.arange(0, PS)
    p_mask = p < P
    states += ((j * (tl.num_programs(0) // chunks // heads) + b) * heads + h) * P * N
    B += b * B_B + t[:, None] * B_T + g * B_G
    C += b * C_B + t[:, None] * C_T + g * C_G
    scores = dot_of_rows(C, B, exists, N, CS, NS, ACC, DOT, PRECISION)
    total = tl.zeros([CS, PS], ACC)
    continues = exists & (d == d_before)
    for first in range(0, N, NS):
        n = first + tl.arange(0, NS)
        C_CN = tl.load(C + n[None, :], exists[:, None] & (n < N)[None, :], other=0.0).to(ACC)
        state_NP = tl.load(states + p[None, :] * N + n[:, None], (n < N)[:, None] & p_mask[None, :], other=0.0)
        total = dot(C_CN, state_NP, total, DOT, PRECISION)
    # Fills, not products with 0: the document before may have left NaN or inf.
    total = tl.where(continues[:, None], total * decay(s, continues, ACC)[:, None], 0.0)
    c = tl.arange(0, CS)
    # Tokens that do not exist are in a document of their own.
    sees = (c[:, None] >= c[None, :]) & (d[:, None] == d[None, :])
    delta_C = tl.load(delta + (b * length + t) * heads + h, exists, other=0.0)
    weights = tl.where(sees, scores * decay(s[:, None] - s[None, :], sees, ACC) * delta_C[None, :], 0.0)
    mask = exists[:, None] & p_mask[None, :]
    x_CP = tl.load(x + b * x_B + t[:, None] * x_T + h * x_H + p[None, :], mask, other=0.0).to(ACC)
    total = dot(weights, finite(x_CP), total, DOT, PRECISION)
    if HAS_D:
        total += tl.load(D + h).to(ACC) * x_CP
    if HAS_Z:
        z_CP = tl.load(z + b * z_B + t[:, None] * z_T + h * z_H + p[None, :], mask, other=0.0).to(ACC)
        gate = tl.sigmoid(z_CP)
        if HAS_GRADIENT:
            grad = tl.load(grad_y + b * y_B + t[:, None] * y_T + h * y_H + p[None, :], mask, other=0.0).to(ACC)
            total = total * grad * gate * (1 + z_CP * (1 - gate))
        else:
            total = total * (z_CP * gate)
    y += ((b * length + t[:, None]) * heads + h) * P + p[None, :]
    tl.store(y, total, mask)
    if not all_finite(x_CP):
        tl.debug_barrier()
        spoil(y, x_CP, mask, d, CS, False)


@dataclass
class Steps:
    """Δ and what follows from it, (B, T, H) and (B, T), made by torch; and how matrices are multiplied."""

    raw: Tensor  # dt with its bias, before softplus
    delta: Tensor
    sums: Tensor  # s_t in float64: decays are differences, and of a sum of −100 float32 leaves five digits
    documents: Tensor
    chunks: int
    padded: int  # tokens of a chunk, with those that only fill up a power of two
    acc: tl.dtype
    dot: tl.dtype
    precision: str


def steps(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    dt_bias: Tensor | None,
    seq_idx: Tensor | None,
    dt_softplus: bool,
    chunk_size: int,
    dtype: torch.dtype,
) -> Steps:
    """The steps of all tokens."""
    raw = dt.to(dtype) if dt_bias is None else dt.to(dtype) + dt_bias.to(dtype)
    delta = torch.nn.functional.softplus(raw, threshold=SOFTPLUS_THRESHOLD) if dt_softplus else raw
    logs = (delta * A.to(dtype)).clamp(min=LOWEST[dtype])
    batch, length, heads = dt.shape
    chunks = triton.cdiv(length, chunk_size)
    padding = (0, 0, 0, chunks * chunk_size - length)
    by_chunk = torch.nn.functional.pad(logs, padding).view(batch, chunks, chunk_size, heads)
    sums = by_chunk.cumsum(dim=2, dtype=torch.float64).view(batch, -1, heads)[:, :length].contiguous()
    documents = dt.new_zeros(batch, length, dtype=torch.int32)
    if seq_idx is not None:
        documents = document_numbers(seq_idx).to(torch.int32).contiguous()
    padded = max(LEAST, triton.next_power_of_2(chunk_size))
    acc, product, precision = accumulator(delta), accumulator(delta), "ieee"
    if {x.dtype, B.dtype, C.dtype} == {torch.bfloat16} and dtype == torch.float32:
        product = tl.bfloat16
    elif {x.dtype, B.dtype, C.dtype} <= {torch.bfloat16, torch.float16} and dtype == torch.float32:
        # States and gradients leave the range of float16: TensorFloat32 has its precision and the range of float32.
        precision = "tf32"
    return Steps(raw, delta.contiguous(), sums, documents, chunks, padded, acc, product, precision)


def forward(
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
    keep_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the final state, and where they are kept the states before each chunk and the final one."""
    dtype = accumulation_dtype(x, dt, A, B, C, D, z, dt_bias, initial_state)
    (batch, length, heads, width), states_size = x.shape, B.shape[3]
    y, final = x.new_empty(x.shape), x.new_empty(batch, heads, width, states_size, dtype=dtype)
    states = final.new_empty(triton.cdiv(length, chunk_size) + 1, *final.shape)
    if length == 0 or y.numel() == 0:
        final.zero_() if initial_state is None else final.copy_(initial_state)
        return y, final, states.copy_(final) if keep_states else states[:0].clone()
    s = steps(x, dt, A, B, C, dt_bias, seq_idx, dt_softplus, chunk_size, dtype)
    x, B, C, z = rows(x), rows(B), rows(C), rows(z)
    with on_device(x):
        if final.numel():
            chunk_states(s, x, B, states, chunk_size)
            pass_states(s, states, initial_state, final, chunk_size, reverse=False)
        chunk_outputs(s, x, B, C, D, z, None, states, y, chunk_size)
    if keep_states:
        states[-1] = final
    return y, final, states if keep_states else states.new_empty(0, *final.shape)


def chunk_states(s: Steps, x: Tensor, B: Tensor, states: Tensor, chunk_size: int) -> None:
    """Write what each chunk adds to the state after it."""
    (batch, length, heads, width), (groups, size) = x.shape, B.shape[2:]
    block_p, block_n = block(width), block(size)
    _chunk_states[(batch * heads * s.chunks, triton.cdiv(width, block_p), triton.cdiv(size, block_n))](
        x, s.delta, s.sums, s.documents, B, states, length, heads, groups, s.chunks,
        *x.stride()[:3], *B.stride()[:3], width, size, chunk_size, s.padded, block_p, block_n,
        s.acc, s.dot, s.precision, num_warps=4, **LAUNCH,
    )  # fmt: skip


def pass_states(
    s: Steps, states: Tensor, start: Tensor | None, final: Tensor, chunk_size: int, *, reverse: bool
) -> None:
    """Write the state before each chunk (or the gradient after it) in place of what it adds, and the last one."""
    batch, heads, width, size = final.shape
    length, per_program = s.delta.shape[1], 512
    _pass_states[(batch * heads, triton.cdiv(width * size, per_program))](
        states, None if start is None else start.contiguous(), final, s.sums, s.documents, length, heads, s.chunks,
        batch * heads, width * size, chunk_size, reverse, start is not None, s.acc, per_program, num_warps=4, **LAUNCH,
    )  # fmt: skip


def chunk_outputs(
    s: Steps,
    x: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    grad_y: Tensor | None,
    states: Tensor,
    out: Tensor,
    chunk_size: int,
) -> None:
    """Write the outputs, or where their gradient is given that of z."""
    (batch, length, heads, width), (groups, size) = x.shape, B.shape[2:]
    block_p, block_n = output_block(s, width), block(size)
    _chunk_outputs[(batch * heads * s.chunks, triton.cdiv(width, block_p))](
        x, s.delta, s.sums, s.documents, B, C, None if D is None else D.contiguous(), x if z is None else z,
        x if grad_y is None else grad_y, states, out, length, heads, groups, s.chunks,
        *x.stride()[:3], *B.stride()[:3], *C.stride()[:3], *strides(z, 3), *strides(grad_y, 3),
        width, size, chunk_size, s.padded, block_p, min(32, block_n), D is not None, z is not None, grad_y is not None,
        s.acc, s.dot, s.precision, num_warps=8, **LAUNCH,
    )  # fmt: skip


def block(size: int) -> int:
    """Columns of a program's matrix."""
    return max(LEAST, min(COLUMNS, triton.next_power_of_2(max(size, 1))))


def output_block(s: Steps, width: int) -> int:
    """Columns of a program that multiplies tokens with one another; without tensor cores its factors take registers."""
    exact = s.precision == "ieee" and s.dot != tl.bfloat16
    return min(32, block(width)) if exact else block(width)
