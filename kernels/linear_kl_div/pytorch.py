"""The divergence of a student's outputs from a teacher's in chunks of tokens (implementation `torch`).

Letters: T tokens of all sequences, C tokens of a chunk, V vocabulary.
"""

import torch
from torch import Tensor

from neural_layers.kernels.chunked_loss import Head
from neural_layers.kernels.chunked_loss.pytorch import chunked_mean, softmax_


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
    return chunked_mean(heads, tokens, forward_kl, scale=scale, factor=factor, chunk_size=chunk_size)


def heads_and_tokens(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    mask: Tensor | None,
    wants: list[bool],
) -> tuple[list[Head], Tensor]:
    """The student's head and the teacher's, and the tokens that count."""
    heads = [Head(student_hidden, student_weight, *wants[:2]), Head(teacher_hidden, teacher_weight, *wants[2:])]
    if mask is None:
        return heads, torch.arange(student_hidden.shape[:-1].numel(), device=student_hidden.device)
    return heads, mask.reshape(-1).nonzero().squeeze(1)


def forward_kl(logits: list[Tensor], tokens_C: Tensor, wants: list[bool]) -> Tensor:
    """KL(p ‖ q) of the teacher's p = softmax(t) and the student's q = softmax(s), and its gradients.

        KL = E_p[t − s] − log Σ exp(t) + log Σ exp(s);  dKL/ds = q − p;  dKL/dt = p · (t − s − E_p[t − s])

    The difference of the logits is taken first: where student and teacher agree it is small, and so is its rounding.
    """
    student_CV, teacher_CV = logits
    p_CV = teacher_CV.clone()
    log_total_C1 = softmax_(p_CV)
    difference_CV = teacher_CV.sub_(student_CV)
    mean_C1 = torch.linalg.vecdot(p_CV, difference_CV).unsqueeze(1)
    losses_C1 = mean_C1 - log_total_C1 + softmax_(student_CV)
    if wants[0]:
        student_CV -= p_CV
    if wants[1]:
        difference_CV.sub_(mean_C1).mul_(p_CV)
    return losses_C1.squeeze(1)
