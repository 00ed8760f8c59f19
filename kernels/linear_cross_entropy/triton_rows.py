"""The cross-entropy of a linear layer's outputs on the GPU (backend `triton`).

torch makes the logits of a chunk of tokens and carries their gradients on; here is what lies between, row by row.

Letters: C tokens of a chunk, V vocabulary, T tokens of all sequences.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl
from torch import Tensor

from neural_layers.kernels.chunked_loss import Head
from neural_layers.kernels.chunked_loss.pytorch import chunked_mean
from neural_layers.kernels.chunked_loss.triton_rows import (
    WARPS,
    add_logits,
    block_of,
    exponential,
    first_greatest,
    whole_row,
)
from neural_layers.kernels.linear_cross_entropy.reference import check_range
from neural_layers.kernels.triton_support import LAUNCH, accumulator, on_device


@triton.jit
def _cross_entropy(
    logits, target, losses, stride, vocabulary,
    WANTS: tl.constexpr, SMOOTHING: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """log Σ exp(s) − (1 − ε) s[target] − ε · mean(s) of a row; in its place softmax(s) − (1 − ε) [v = target] − ε / V.

    Reads the row, for about 12 operations a logit; where the gradient is wanted, reads it again, from the L2 cache, and
    writes that: 8 bytes a logit of float32.
    """
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    column = tl.arange(0, BLOCK)
    at = tl.load(target + row)
    # Before the sums, at which threads wait for each other: after them another may have written the gradient.
    expected = tl.load(logits + at).to(ACC)
    greatest = first_greatest(BLOCK, ACC)
    total, linear = tl.zeros([BLOCK], ACC), tl.zeros([BLOCK], ACC)
    for first in range(0, vocabulary, BLOCK):
        v = first + column
        exists = v < vocabulary
        s = tl.load(logits + v, exists, other=float("-inf")).to(ACC)
        greatest, total, _, _ = add_logits(greatest, total, s)
        if SMOOTHING > 0:
            linear += tl.where(exists, s, 0.0)
    largest, whole, _ = whole_row(greatest, total)
    floor = tl.zeros_like(expected)
    if SMOOTHING > 0:
        expected += (tl.sum(linear, axis=0) / vocabulary - expected) * SMOOTHING
        floor += SMOOTHING
        floor /= vocabulary
    tl.store(losses + row, (largest - expected) + tl.log(whole))
    if WANTS:
        share = 1.0 / whole
        peak = floor + (1 - SMOOTHING)
        for first in range(0, vocabulary, BLOCK):
            v = first + column
            exists = v < vocabulary
            s = tl.load(logits + v, exists, other=0.0).to(ACC)
            tl.store(logits + v, exponential(s - largest) * share - tl.where(v == at, peak, floor), exists)


def cross_entropy(logits_CV: Tensor, target_C: Tensor, label_smoothing: float, wants_gradient: bool) -> Tensor:
    """The losses of rows of logits, and their gradients in place of the logits where wanted."""
    losses_C = logits_CV.new_empty(len(logits_CV))
    if len(losses_C):
        with on_device(logits_CV):
            _cross_entropy[(len(losses_C),)](
                logits_CV, target_C, losses_C, logits_CV.stride(0), logits_CV.shape[1],
                wants_gradient, label_smoothing, block_of(logits_CV), accumulator(logits_CV),
                num_warps=WARPS, **LAUNCH,
            )  # fmt: skip
    return losses_C


def run(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    ignore_index: int,
    label_smoothing: float,
    chunk_size: int | None,
    wants: list[bool],
) -> tuple[Tensor, list[Tensor]]:
    """The loss, and the gradients of hidden and weight, in the accumulation dtype."""
    target_T = target.reshape(-1)
    tokens = (target_T != ignore_index).nonzero().squeeze(1)
    check_range(target_T[tokens], len(weight), ignore_index)

    def formula(logits: list[Tensor], tokens_C: Tensor, wants: list[bool]) -> Tensor:
        return cross_entropy(logits[0], target_T[tokens_C], label_smoothing, wants[0])

    head = Head(hidden, weight, *wants)
    return chunked_mean([head], tokens, formula, whole_chunks=True, chunk_size=chunk_size)
