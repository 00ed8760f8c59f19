"""The divergence of a student's outputs from a teacher's on the GPU (backend `triton`).

torch makes the logits of a chunk of tokens and carries their gradients on; here is what lies between, row by row.

Letters: C tokens of a chunk, V vocabulary.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl
from torch import Tensor

from neural_layers.kernels.chunked_loss.pytorch import chunked_mean
from neural_layers.kernels.chunked_loss.triton_rows import (
    WARPS,
    add_logits,
    block_of,
    exponential,
    first_greatest,
    whole_row,
)
from neural_layers.kernels.linear_kl_div.pytorch import heads_and_tokens
from neural_layers.kernels.triton_support import LAUNCH, accumulator, on_device


@triton.jit
def _divergence(
    student, teacher, losses, student_stride, teacher_stride, vocabulary,
    WANTS_STUDENT: tl.constexpr, WANTS_TEACHER: tl.constexpr, BLOCK: tl.constexpr, ACC: tl.constexpr,
):  # fmt: skip
    """E_p[t − s] − log Σ exp(t) + log Σ exp(s) of a row, and in place of its logits the gradients.

    Reads both rows, for about 25 operations a logit; where a gradient is wanted, reads them again, from the L2 cache,
    and writes that: 12 bytes a logit of float32 with the student's gradient alone, 16 with both.
    """
    row = tl.program_id(0).to(tl.int64)
    student += row * student_stride
    teacher += row * teacher_stride
    column = tl.arange(0, BLOCK)
    max_s = first_greatest(BLOCK, ACC)
    max_t = first_greatest(BLOCK, ACC)
    sum_s, sum_t, sum_d = tl.zeros([BLOCK], ACC), tl.zeros([BLOCK], ACC), tl.zeros([BLOCK], ACC)
    for first in range(0, vocabulary, BLOCK):
        v = first + column
        exists = v < vocabulary
        s = tl.load(student + v, exists, other=float("-inf")).to(ACC)
        t = tl.load(teacher + v, exists, other=float("-inf")).to(ACC)
        max_s, sum_s, _, _ = add_logits(max_s, sum_s, s)
        max_t, sum_t, weight, factor = add_logits(max_t, sum_t, t)
        sum_d = sum_d * factor + weight * (tl.where(exists, t, 0.0) - tl.where(exists, s, 0.0))
    max_s, sum_s, _ = whole_row(max_s, sum_s)
    max_t, sum_t, factor = whole_row(max_t, sum_t)
    mean = tl.sum(sum_d * factor, axis=0) / sum_t
    # Where student and teacher agree, each of the three differences is small, and so is its rounding.
    tl.store(losses + row, mean - (max_t - max_s) - (tl.log(sum_t) - tl.log(sum_s)))
    if WANTS_STUDENT or WANTS_TEACHER:
        share_s, share_t = 1.0 / sum_s, 1.0 / sum_t
        for first in range(0, vocabulary, BLOCK):
            v = first + column
            exists = v < vocabulary
            s = tl.load(student + v, exists, other=0.0).to(ACC)
            t = tl.load(teacher + v, exists, other=0.0).to(ACC)
            p = exponential(t - max_t) * share_t
            if WANTS_STUDENT:
                tl.store(student + v, exponential(s - max_s) * share_s - p, exists)
            if WANTS_TEACHER:
                tl.store(teacher + v, p * ((t - s) - mean), exists)


def forward_kl(logits: list[Tensor], tokens_C: Tensor, wants: list[bool]) -> Tensor:
    """KL(p ‖ q) of the teacher's p = softmax(t) and the student's q = softmax(s), and its gradients in their place."""
    student_CV, teacher_CV = logits
    losses_C = student_CV.new_empty(len(student_CV))
    if len(losses_C):
        with on_device(student_CV):
            _divergence[(len(losses_C),)](
                student_CV, teacher_CV, losses_C, student_CV.stride(0), teacher_CV.stride(0), student_CV.shape[1],
                *wants, block_of(student_CV), accumulator(student_CV), num_warps=WARPS, **LAUNCH,
            )  # fmt: skip
    return losses_C


def run(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    mask: Tensor | None,
    temperature: float,
    chunk_size: int | None,
    wants: list[bool],
) -> tuple[Tensor, list[Tensor]]:
    """The loss, and the gradients of the four tensors in their order, in the accumulation dtype."""
    tensors = (student_hidden, student_weight, teacher_hidden, teacher_weight)
    heads, tokens = heads_and_tokens(*tensors, mask, wants)
    scale, factor = 1 / temperature, temperature**2
    return chunked_mean(heads, tokens, forward_kl, scale=scale, factor=factor, chunk_size=chunk_size, whole_chunks=True)
