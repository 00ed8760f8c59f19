"""The causal depthwise convolution on the GPU (backend `triton`), backward.

A program walks through a stretch of tokens of a few hundred channels. It keeps the last W − 1 inputs, and the gradients
that the last W − 1 positions have collected, in registers, so that inputs and gradients are read once, and the
activation is computed again once. A stretch walks W − 1 tokens further than its own, whose gradients reach back into
it. The gradients of weight and bias are summed for each stretch, and torch adds the sums: no atomics.

Letters: B batch, T length, E channels, W taps, of which tap W − 1 − j sees the input j tokens back; P stretches.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs, disable-error-code="assignment, var-annotated"

import triton
import triton.language as tl
from torch import Tensor

from neural_layers.kernels.arguments import accumulation_dtype
from neural_layers.kernels.triton_math import sigmoid
from neural_layers.kernels.triton_support import LAUNCH, accumulator, multiprocessors, on_device, strides

# Tokens of the longest and of the shortest stretch, and tokens that are loaded together: as many as registers hold.
LONGEST, SHORTEST, TOGETHER, TOGETHER_OF_DOCUMENTS = 128, 16, 4, 2


@triton.jit
def _push(window, newest, W: tl.constexpr):
    """A window of W − 1 without its oldest entry, and with the newest."""
    pushed = ()
    for i in tl.static_range(1, W - 1):
        pushed = pushed + (window[i],)
    if W > 1:
        pushed = pushed + (newest,)
    return pushed


@triton.jit
def _empty_where(window, gone, W: tl.constexpr):
    """The window with zeros in the place of all its entries where `gone`."""
    emptied = ()
    for i in tl.static_range(W - 1):
        emptied = emptied + (tl.where(gone, 0, window[i]),)
    return emptied


@triton.jit
def _step(
    t, grad, value, inputs, collected, alive, weights, bias, length, W: tl.constexpr, SILU: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """The gradient before the activation at token t, and the window of gradients with what it adds to it.

    The last entry of that window is token t itself, one more than the window had.
    """
    if SILU:
        total = value * weights[W - 1] + bias
        for i in tl.static_range(W - 1):
            total += inputs[i] * weights[i]
        s = sigmoid(total)
        grad = grad * (s + total * s * (1 - s))
    if EDGE:
        grad = tl.where(t < length, grad, 0.0)  # a NaN among the last inputs must not reach past the end
    added = ()
    for i in tl.static_range(W - 1):
        share = weights[i] * grad
        if HAS_DOCUMENTS:
            share = tl.where(alive[i] != 0, share, 0.0)
        added = added + (collected[i] + share,)
    return grad, added + (weights[W - 1] * grad,)


@triton.jit
def _add_products(sums, grad, inputs, value, is_own, W: tl.constexpr, EDGE: tl.constexpr):
    """The gradients of the weights, and of the bias behind them, with the share of one token of this stretch added."""
    added = ()
    for i in tl.static_range(W + 1):
        if i < W - 1:
            share = grad * inputs[i]
        elif i == W - 1:
            share = grad * value
        else:
            share = grad
        if EDGE:
            share = tl.where(is_own, share, 0.0)
        added = added + (sums[i] + share,)
    return added


@triton.jit
def _walk(
    start, windows, sums, weights, bias, exists, first, end, length, channels,
    x, x_T, grad_y, y_T, grad_final, final_W, seq_idx, seq_T, grad_x, grad_state,
    W: tl.constexpr, SILU: tl.constexpr, HAS_STATE: tl.constexpr, HAS_FINAL: tl.constexpr, HAS_DOCUMENTS: tl.constexpr,
    ACC: tl.constexpr, TOGETHER: tl.constexpr, EDGE: tl.constexpr,
):  # fmt: skip
    """Walk over a few tokens, all of them within the stretch unless EDGE; the windows and sums after them.

    At token t position t − (W − 1) is complete and stored. After the last token the final state reads the positions, as
    far as they are of the last document.
    """
    inputs, collected, alive, document = windows
    values = ()
    grads = ()
    documents = ()
    for i in tl.static_range(TOGETHER):
        inside = exists & (start + i < length)
        values = values + (tl.load(x + (start + i) * x_T, inside, other=0.0),)
        grads = grads + (tl.load(grad_y + (start + i) * y_T, inside, other=0.0),)
        if HAS_DOCUMENTS:
            documents = documents + (tl.load(seq_idx + tl.minimum(start + i, length - 1) * seq_T, length > 0, other=0),)
    for i in tl.static_range(TOGETHER):
        t = start + i
        value = values[i].to(ACC)
        if HAS_DOCUMENTS:
            inputs = _empty_where(inputs, documents[i] != document, W)
            alive = _empty_where(alive, documents[i] != document, W)
            document = documents[i]
        grad, collected = _step(
            t, grads[i].to(ACC), value, inputs, collected, alive, weights, bias, length, W, SILU, HAS_DOCUMENTS, EDGE
        )
        sums = _add_products(sums, grad, inputs, value, t < end, W, EDGE)
        s = t - (W - 1)
        complete = collected[0]
        if EDGE and HAS_FINAL:
            is_kept = exists & (t >= length) & (t - length < W - 1)
            g = tl.load(grad_final + (t - length) * final_W, is_kept, other=0.0).to(ACC)
            if HAS_DOCUMENTS:
                g = tl.where(alive[0] != 0, g, 0.0)
            complete += g
        tl.store(grad_x + s * channels, complete, exists & (s >= first) & (s < end))
        if EDGE and HAS_STATE:
            tl.store(grad_state + t * channels, complete, exists & (s < 0))
        collected = collected[1:]
        inputs = _push(inputs, value, W)
        alive = _push(alive, tl.full([], 1, tl.int32), W)
    return (inputs, collected, alive, document), sums


@triton.jit
def _convolve_backward(
    grad_y, grad_final, x, weight, bias, state, seq_idx, grad_x, grad_state, partial,
    length, channels, stretches, y_B, y_T, y_E, final_B, final_W, final_E, x_B, x_T, x_E, weight_E, weight_W,
    state_B, state_W, state_E, seq_B, seq_T,
    W: tl.constexpr, SILU: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_STATE: tl.constexpr, HAS_FINAL: tl.constexpr,
    HAS_DOCUMENTS: tl.constexpr, ACC: tl.constexpr, TOKENS: tl.constexpr, TOGETHER: tl.constexpr,
    CHANNELS: tl.constexpr,
):  # fmt: skip
    """grad_x, the initial state's gradient, and this stretch's share of the gradients of weight and bias.

    Reads x and grad_y and writes grad_x once, 6 bytes an element in bfloat16, and (W − 1)/TOKENS of that again, for 3·W
    multiply-adds and about 20 operations of silu.
    """
    program = tl.program_id(0).to(tl.int64)
    b = program // stretches
    first = (program - b * stretches) * TOKENS
    e = tl.program_id(1).to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS)
    exists = e < channels
    x += b * x_B + e * x_E
    grad_y += b * y_B + e * y_E
    grad_final += b * final_B + e * final_E
    grad_x += b * length * channels + e
    grad_state += b * (W - 1) * channels + e
    seq_idx += b * seq_B

    nothing = tl.zeros([CHANNELS], ACC)
    bias_E = nothing
    if HAS_BIAS:
        bias_E = tl.load(bias + e, exists, other=0.0).to(ACC)
    weights = ()
    sums = (nothing,)
    for i in tl.static_range(W):
        weights = weights + (tl.load(weight + e * weight_E + i * weight_W, exists, other=0.0).to(ACC),)
        sums = sums + (nothing,)

    # Windows over the last W − 1 positions, the oldest first: the inputs, zero where they are of another document; the
    # gradients collected; and whether the position is of the current document.
    inputs = ()
    collected = ()
    alive = ()
    for _ in tl.static_range(W - 1):
        inputs = inputs + (nothing,)
        collected = collected + (nothing,)
        alive = alive + (tl.full([], 1, tl.int32),)
    # Inputs before the first token belong to its document, and what follows the last one to the last one's.
    document = tl.full([], 0, tl.int32)
    if HAS_DOCUMENTS:
        document = tl.load(seq_idx + tl.maximum(first - (W - 1), 0) * seq_T, length > 0, other=0)
    for i in tl.static_range(W - 1):
        s = first - (W - 1) + i
        if HAS_DOCUMENTS:
            next_document = tl.load(seq_idx + tl.maximum(s, 0) * seq_T, length > 0, other=0)
            inputs = _empty_where(inputs, next_document != document, W)
            alive = _empty_where(alive, next_document != document, W)
            document = next_document
        value = tl.load(x + s * x_T, exists & (s >= 0) & (s < length), other=0.0).to(ACC)
        if HAS_STATE:
            at = state + b * state_B + e * state_E + (s + W - 1) * state_W
            value += tl.load(at, exists & (s < 0), other=0.0).to(ACC)
        inputs = _push(inputs, value, W)
        alive = _push(alive, tl.full([], 1, tl.int32), W)

    windows = (inputs, collected, alive, document)
    end = tl.minimum(first + TOKENS, length)
    for start in range(first, end + W - 1, TOGETHER):
        if (start + TOGETHER > end) | (start < W - 1):
            windows, sums = _walk(
                start, windows, sums, weights, bias_E, exists, first, end, length, channels,
                x, x_T, grad_y, y_T, grad_final, final_W, seq_idx, seq_T, grad_x, grad_state,
                W, SILU, HAS_STATE, HAS_FINAL, HAS_DOCUMENTS, ACC, TOGETHER, EDGE=True,
            )  # fmt: skip
        else:
            windows, sums = _walk(
                start, windows, sums, weights, bias_E, exists, first, end, length, channels,
                x, x_T, grad_y, y_T, grad_final, final_W, seq_idx, seq_T, grad_x, grad_state,
                W, SILU, HAS_STATE, HAS_FINAL, HAS_DOCUMENTS, ACC, TOGETHER, EDGE=False,
            )  # fmt: skip

    partial += program * (W + 1) * channels + e
    for i in tl.static_range(W + 1):
        tl.store(partial + i * channels, sums[i], exists)


def backward(
    grad_y: Tensor,
    grad_final_state: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    activation: str | None,
) -> list[Tensor]:
    """The gradients of x and weight, and of bias and initial_state where given."""
    batch, length, channels = x.shape
    taps, acc = weight.shape[1], accumulator(x, weight, bias, initial_state)
    grad_x = x.new_empty(x.shape)
    grad_state = None if initial_state is None else initial_state.new_empty(initial_state.shape)
    block, warps, tokens = _stretch(x, taps, acc.primitive_bitwidth // 8)
    stretches = max(1, triton.cdiv(length, tokens))
    wide = accumulation_dtype(x, weight, bias, initial_state)
    partial = x.new_empty(batch * stretches, taps + 1, channels, dtype=wide)
    has_final = grad_final_state is not None and grad_final_state.numel() > 0
    if partial.numel():
        # What is absent is never read: x stands in for its address.
        bias_E = None if bias is None else bias.contiguous()
        given = [x if tensor is None else tensor for tensor in (grad_final_state, bias_E, initial_state, seq_idx)]
        final_or_x, bias_or_x, state_or_x, seq_idx_or_x = given
        with on_device(x):
            _convolve_backward[(batch * stretches, triton.cdiv(channels, block))](
                grad_y, final_or_x, x, weight, bias_or_x, state_or_x, seq_idx_or_x,
                grad_x, x if grad_state is None else grad_state, partial,
                length, channels, stretches, *grad_y.stride(), *strides(grad_final_state, 3), *x.stride(),
                *weight.stride(), *strides(initial_state, 3), *strides(seq_idx, 2),
                taps, activation == "silu", bias is not None, initial_state is not None, has_final,
                seq_idx is not None, acc, tokens, TOGETHER if seq_idx is None else TOGETHER_OF_DOCUMENTS, block,
                num_warps=warps, **LAUNCH,
            )  # fmt: skip
    sums = partial.sum(dim=0)
    gradients = [grad_x, sums[:taps].t().to(weight.dtype).contiguous()]
    gradients += [] if bias is None else [sums[taps].to(bias.dtype, copy=True)]  # no output may alias another
    return gradients if grad_state is None else [*gradients, grad_state]


def _stretch(x: Tensor, taps: int, acc_size: int) -> tuple[int, int, int]:
    """Channels of a program, its warps, and tokens of its stretch.

    A thread keeps four arrays of `taps` for each of its channels. It has 2 of four taps in float32, so that registers
    leave room for 24 warps on a multiprocessor; stretches are as long as leaves each of them 16 to run.
    """
    batch, length, channels = x.shape
    to_a_thread = max(1, min(4, 32 // (taps * acc_size)))
    block = min(128 * to_a_thread, triton.next_power_of_2(channels))
    warps, tokens = max(1, block // (32 * to_a_thread)), LONGEST
    busy = batch * triton.cdiv(channels, block) * warps
    while tokens > SHORTEST and busy * triton.cdiv(length, tokens) < 16 * multiprocessors(x.device):
        tokens //= 2
    return block, warps, tokens
