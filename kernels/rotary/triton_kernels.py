"""The rotary embedding on the GPU (backend `triton`): the rotation, its inverse, and the gradients of cos and sin.

A program rotates a tile of tokens × heads × pairs and reads the angles of its tokens once for all heads. Inputs may
have any strides; outputs are contiguous.

Letters: B batch, T length, H heads, K head width, P = K/2 pairs; N = B·T tokens.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl
from torch import Tensor

from neural_layers.kernels.triton_support import LAUNCH, accumulator, on_device

# Pairs to a program: with 4 warps 8 pairs to a thread, two loads of 16 bytes in bfloat16.
PAIRS, WARPS = 1024, 4


@triton.jit
def _rotate(
    x, cos, sin, out, tokens, length, heads, P,
    x_B, x_T, x_H, x_K, cos_B, cos_T, cos_P, sin_B, sin_T, sin_P,
    INVERSE: tl.constexpr, ACC: tl.constexpr, TOKENS: tl.constexpr, HEADS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """out = (x₁·cos − x₂·sin, x₂·cos + x₁·sin) of both halves of x, or with INVERSE the rotation back.

    Reads and writes x once, 4 bytes an element in bfloat16, for 3 operations; the angles of a token once for all heads.
    """
    n = tl.program_id(0).to(tl.int64) * TOKENS + tl.arange(0, TOKENS)
    h = tl.program_id(1).to(tl.int64) * HEADS + tl.arange(0, HEADS)
    p = tl.arange(0, COLUMNS)
    b = n // length
    t = n - b * length
    has_angle = (n < tokens)[:, None] & (p < P)[None, :]
    c = tl.load(cos + (b * cos_B + t * cos_T)[:, None] + p[None, :] * cos_P, has_angle, other=0.0).to(ACC)
    s = tl.load(sin + (b * sin_B + t * sin_T)[:, None] + p[None, :] * sin_P, has_angle, other=0.0).to(ACC)
    if INVERSE:
        s = -s
    c = tl.expand_dims(c, 1)
    s = tl.expand_dims(s, 1)
    exists = has_angle[:, None, :] & (h < heads)[None, :, None]
    at = x + (b * x_B + t * x_T)[:, None, None] + h[None, :, None] * x_H + p[None, None, :] * x_K
    first = tl.load(at, exists, other=0.0).to(ACC)
    second = tl.load(at + P * x_K, exists, other=0.0).to(ACC)
    to = out + (n[:, None, None] * heads + h[None, :, None]) * (2 * P) + p[None, None, :]
    tl.store(to, first * c - second * s, exists)
    tl.store(to + P, second * c + first * s, exists)


@triton.jit
def _angle_gradients(
    grad, x, grad_cos, grad_sin, rows, length, repeats, heads, P,
    g_B, g_T, g_H, g_K, x_B, x_T, x_H, x_K,
    INVERSE: tl.constexpr, ACC: tl.constexpr, ROWS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """grad_cos = Σ g₁·x₁ + g₂·x₂ and grad_sin = Σ g₂·x₁ − g₁·x₂ over the heads that share an angle, in their order.

    `repeats` is B where the rows of a batch share their angles, otherwise 1. Reads grad and x once, 4 bytes an element
    in bfloat16, for 4 operations.
    """
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    p = tl.arange(0, COLUMNS)
    b = row // length
    t = row - b * length
    exists = (row < rows)[:, None] & (p < P)[None, :]
    total_cos = tl.zeros([ROWS, COLUMNS], ACC)
    total_sin = tl.zeros([ROWS, COLUMNS], ACC)
    for i in range(tl.zeros([], tl.int64), repeats * heads):  # from a 64-bit 0, for the offsets
        h = i % heads
        batch = b + i // heads
        g_at = grad + (batch * g_B + t * g_T + h * g_H)[:, None] + p[None, :] * g_K
        x_at = x + (batch * x_B + t * x_T + h * x_H)[:, None] + p[None, :] * x_K
        g_first = tl.load(g_at, exists, other=0.0).to(ACC)
        g_second = tl.load(g_at + P * g_K, exists, other=0.0).to(ACC)
        first = tl.load(x_at, exists, other=0.0).to(ACC)
        second = tl.load(x_at + P * x_K, exists, other=0.0).to(ACC)
        total_cos += g_first * first + g_second * second
        total_sin += g_second * first - g_first * second
    if INVERSE:
        total_sin = -total_sin
    to = row[:, None] * P + p[None, :]
    tl.store(grad_cos + to, total_cos, exists)
    tl.store(grad_sin + to, total_sin, exists)


def rotate(x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> Tensor:
    """Each pair of x turned by its angle, or back where `inverse`."""
    out = x.new_empty(x.shape)
    if out.numel() == 0:
        return out
    batch, length, heads, width = x.shape
    columns, tokens = triton.next_power_of_2(width // 2), batch * length
    head_block = min(triton.next_power_of_2(heads), max(1, PAIRS // columns))
    token_block = max(1, PAIRS // (columns * head_block))
    grid = triton.cdiv(tokens, token_block), triton.cdiv(heads, head_block)
    with on_device(x):
        _rotate[grid](
            x, cos, sin, out, tokens, length, heads, width // 2, *x.stride(), *_strides(cos), *_strides(sin),
            inverse, accumulator(x, cos, sin), token_block, head_block, columns,
            num_warps=WARPS, **LAUNCH,
        )  # fmt: skip
    return out


def angle_gradients(grad: Tensor, x: Tensor, cos: Tensor, sin: Tensor, inverse: bool) -> tuple[Tensor, Tensor]:
    """The gradients of cos and sin."""
    grad_cos, grad_sin = cos.new_empty(cos.shape), sin.new_empty(sin.shape)
    batch, length, heads, width = x.shape
    if grad_cos.numel() == 0 or x.numel() == 0:
        return grad_cos.zero_(), grad_sin.zero_()
    columns, rows = triton.next_power_of_2(width // 2), cos.numel() // (width // 2)
    block = max(1, 512 // columns)
    with on_device(x):
        _angle_gradients[(triton.cdiv(rows, block),)](
            grad, x, grad_cos, grad_sin, rows, length, batch if cos.ndim == 2 else 1, heads, width // 2,
            *grad.stride(), *x.stride(), inverse, accumulator(x, cos, sin), block, columns,
            num_warps=WARPS, **LAUNCH,
        )  # fmt: skip
    return grad_cos, grad_sin


def _strides(angles: Tensor) -> tuple[int, ...]:
    """The strides along B, T and P; rows of a batch that share their angles lie at a distance of 0."""
    return angles.stride() if angles.ndim == 3 else (0, *angles.stride())
