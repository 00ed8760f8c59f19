"""The definition of the divergence of a student's outputs from a teacher's, in plain arithmetic on all the logits."""

import torch
from torch import Tensor

from neural_layers.kernels.arguments import accumulation_dtype


def linear_kl_div_reference(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    chunk_size: int | None = None,
) -> Tensor:
    """T² · mean over the tokens that count of Σ_v p_v (log p_v − log q_v); p, q = softmax(h Wᵀ / T), p the teacher's.

    chunk_size changes nothing here: all the logits are there at once.
    """
    dtype = accumulation_dtype(student_hidden, student_weight, teacher_hidden, teacher_weight)
    if mask is None:
        mask = torch.ones(student_hidden.shape[:-1], dtype=torch.bool, device=student_hidden.device)
    log_q = _log_softmax(student_hidden.to(dtype), student_weight.to(dtype), temperature, mask)
    log_p = _log_softmax(teacher_hidden.to(dtype), teacher_weight.to(dtype), temperature, mask)
    divergences = (log_p.exp() * (log_p - log_q)).sum(dim=-1)
    return temperature**2 * divergences.masked_fill(~mask, 0).sum() / mask.sum()


def _log_softmax(hidden: Tensor, weight: Tensor, temperature: float, mask: Tensor) -> Tensor:
    # Filled before the product, so that nothing in a row that does not count reaches a gradient.
    return torch.log_softmax(hidden.masked_fill(~mask.unsqueeze(-1), 0) @ weight.T / temperature, dim=-1)
