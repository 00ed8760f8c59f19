"""The causal depthwise convolution on the GPU (backend `triton`), forward: outputs and final state.

A program computes a tile of tokens × channels. Each tap is a load of the same tile, shifted by a token; all but the
first are served by the L1 cache. The documents of `seq_idx` are followed from each token backward, border by border.

Letters: B batch, T length, E channels, W taps, of which tap W − 1 − j sees the input j tokens back.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

import torch
import triton
import triton.language as tl
from torch import Tensor

from neural_layers.kernels.triton_math import sigmoid
from neural_layers.kernels.triton_support import LAUNCH, accumulator, on_device, strides

# Bytes of a tile's row, and bytes of accumulators of a tile: 64 to a thread.
ROW_BYTES, TILE_BYTES = 256, 16384


@triton.jit
def _same_document(seq_idx, seq_T, s, alive):
    """Of the tokens whose document reached back to s + 1 (`alive`), those whose document reaches back to s.

    Inputs before the first token belong to its document.
    """
    inside = alive & (s >= 0)
    here = tl.load(seq_idx + s * seq_T, inside, other=0)
    after = tl.load(seq_idx + (s + 1) * seq_T, inside, other=0)
    return alive & (here == after)


@triton.jit
def _convolve(
    x, weight, bias, state, seq_idx, y, length, channels, blocks,
    x_B, x_T, x_E, weight_E, weight_W, state_B, state_W, state_E, seq_B, seq_T,
    W: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_STATE: tl.constexpr, HAS_DOCUMENTS: tl.constexpr,
    ACC: tl.constexpr, TOKENS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """y[t] = Σ_j weight[W − 1 − j]·x[t − j] + bias, then silu.

    Reads x and writes y once, 4 bytes an element in bfloat16, for W multiply-adds and about 5 operations of silu.
    """
    program = tl.program_id(0).to(tl.int64)
    b = program // blocks
    t = (program - b * blocks) * TOKENS + tl.arange(0, TOKENS)
    e = tl.program_id(1).to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS)
    alive = t < length
    total = tl.zeros([TOKENS, CHANNELS], ACC)
    for j in tl.static_range(W):
        s = t - j
        if HAS_DOCUMENTS and j > 0:
            alive = _same_document(seq_idx + b * seq_B, seq_T, s, alive)
        w = tl.load(weight + e * weight_E + (W - 1 - j) * weight_W, e < channels, other=0.0).to(ACC)
        at = x + b * x_B + s[:, None] * x_T + e[None, :] * x_E
        value = tl.load(at, (alive & (s >= 0))[:, None] & (e < channels)[None, :], other=0.0).to(ACC)
        if HAS_STATE and j > 0:
            at = state + b * state_B + (s + W - 1)[:, None] * state_W + e[None, :] * state_E
            value += tl.load(at, (alive & (s < 0))[:, None] & (e < channels)[None, :], other=0.0).to(ACC)
        total += value * w[None, :]
    if HAS_BIAS:
        total += tl.load(bias + e, e < channels, other=0.0).to(ACC)[None, :]
    if SILU:
        total = total * sigmoid(total)
    to = y + (b * length + t[:, None]) * channels + e[None, :]
    tl.store(to, total, (t < length)[:, None] & (e < channels)[None, :])


@triton.jit
def _last_inputs(
    x, state, seq_idx, final, length, channels,
    x_B, x_T, x_E, state_B, state_W, state_E, seq_B, seq_T,
    W: tl.constexpr, HAS_STATE: tl.constexpr, HAS_DOCUMENTS: tl.constexpr, ACC: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """The last W − 1 inputs, zeros for those of another document than the last token's."""
    b = tl.program_id(0).to(tl.int64)
    e = tl.program_id(1).to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS)
    alive = e < channels
    for j in tl.static_range(W - 1):
        s = length - 1 - j + tl.zeros([CHANNELS], tl.int32)
        if HAS_DOCUMENTS and j > 0:
            alive = _same_document(seq_idx + b * seq_B, seq_T, s, alive)
        value = tl.load(x + b * x_B + s * x_T + e * x_E, alive & (s >= 0), other=0.0).to(ACC)
        if HAS_STATE:
            at = state + b * state_B + (s + W - 1) * state_W + e * state_E
            value += tl.load(at, alive & (s < 0), other=0.0).to(ACC)
        tl.store(final + (b * (W - 1) + W - 2 - j) * channels + e, value, e < channels)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    activation: str | None,
    return_final_state: bool,
) -> tuple[Tensor, Tensor]:
    """y (B, T, E), and the final state (B, W − 1, E), or (B, 0, E) where it is not wanted."""
    batch, length, channels = x.shape
    taps = weight.shape[1]
    dtype = x.dtype if initial_state is None else torch.promote_types(x.dtype, initial_state.dtype)
    y = x.new_empty(x.shape)
    final = x.new_empty(batch, taps - 1 if return_final_state else 0, channels, dtype=dtype)
    acc = accumulator(x, weight, bias, initial_state)
    with on_device(x):
        if y.numel():
            token_block, channel_block, warps = _tile(length, channels, x.element_size(), acc.primitive_bitwidth // 8)
            blocks = triton.cdiv(length, token_block)
            # With neighbouring channels a tap's weights are loaded together; for a few tokens the copy costs more.
            taps_first = weight if length < 8 else weight.t().contiguous().t()
            _convolve[(batch * blocks, triton.cdiv(channels, channel_block))](
                x, taps_first, None if bias is None else bias.contiguous(), initial_state, seq_idx, y,
                length, channels, blocks, *x.stride(), *taps_first.stride(), *strides(initial_state, 3),
                *strides(seq_idx, 2), taps, activation == "silu", bias is not None, initial_state is not None,
                seq_idx is not None, acc, token_block, channel_block,
                num_warps=warps, **LAUNCH,
            )  # fmt: skip
        if final.numel():
            _last_inputs[(batch, triton.cdiv(channels, 256))](
                x, initial_state, seq_idx, final, length, channels, *x.stride(), *strides(initial_state, 3),
                *strides(seq_idx, 2), taps, initial_state is not None, seq_idx is not None, acc, 256,
                **LAUNCH,
            )  # fmt: skip
    return y, final


def _tile(length: int, channels: int, element_size: int, acc_size: int) -> tuple[int, int, int]:
    """Tokens and channels of a tile, and its warps."""
    channel_block = min(triton.next_power_of_2(channels), ROW_BYTES // element_size)
    token_block = min(triton.next_power_of_2(length), TILE_BYTES // (channel_block * acc_size))
    return token_block, channel_block, 8 if token_block * channel_block * acc_size >= TILE_BYTES else 4
