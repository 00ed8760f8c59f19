"""The divergence of a student's outputs from a teacher's in C (implementation `native`).

Letters: C tokens of a chunk, V vocabulary, J blocks of the vocabulary.
"""

import torch
from torch import Tensor

from neural_layers.kernels.chunked_loss.native import Formula, chunked_mean
from neural_layers.kernels.linear_kl_div.pytorch import heads_and_tokens

_CODE = 1


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
    return chunked_mean(heads, tokens, Formula(_CODE, _combine), scale=scale, factor=factor, chunk_size=chunk_size)


def _combine(statistics: Tensor, logits: list[Tensor], tokens_C: Tensor) -> tuple[Tensor, Tensor]:
    """E_p[t − s] − log Σ exp(t) + log Σ exp(s), p = softmax(t)."""
    max_s_JC, sum_s_JC, max_t_JC, sum_t_JC, difference_JC = statistics.unbind(1)
    max_s_C, max_t_C = max_s_JC.amax(0), max_t_JC.amax(0)
    sum_s_C = (sum_s_JC * (max_s_JC - max_s_C).exp()).sum(0)
    weight_t_JC = (max_t_JC - max_t_C).exp()
    sum_t_C = (sum_t_JC * weight_t_JC).sum(0)
    difference_C = (difference_JC * weight_t_JC).sum(0) / sum_t_C
    losses_C = difference_C - (max_t_C + sum_t_C.log()) + (max_s_C + sum_s_C.log())
    return losses_C, torch.stack([max_s_C, 1 / sum_s_C, max_t_C, 1 / sum_t_C, difference_C])
