"""Divergences of a student's distribution q from a teacher's p, each for one row of log-probabilities.

Letters: N rows, V vocabulary (or the cells of a coarser distribution).
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

Divergence = Callable[[Tensor, Tensor], Tensor]
"""(log q (N, V), log p (N, V)) → (N)"""


def forward_kl(log_q: Tensor, log_p: Tensor) -> Tensor:
    """KL(p ‖ q) = Σ_v p_v (log p_v − log q_v): the student covers what the teacher may say (arXiv 1503.02531)."""
    return (log_p.exp() * (log_p - log_q)).sum(dim=-1)


def reverse_kl(log_q: Tensor, log_p: Tensor) -> Tensor:
    """KL(q ‖ p) = Σ_v q_v (log q_v − log p_v): the student keeps to what the teacher is sure of (arXiv 2306.08543)."""
    return (log_q.exp() * (log_q - log_p)).sum(dim=-1)


def jensen_shannon(log_q: Tensor, log_p: Tensor) -> Tensor:
    """½ KL(p ‖ m) + ½ KL(q ‖ m) with m = (p + q) / 2: symmetric, and at most log 2.

    The generalised one of arXiv 2306.13649 with the weight ½.
    """
    log_m = torch.logaddexp(log_p, log_q) - math.log(2)
    return (forward_kl(log_m, log_p) + forward_kl(log_m, log_q)) / 2


DIVERGENCES: dict[str, Divergence] = {"forward": forward_kl, "reverse": reverse_kl, "jsd": jensen_shannon}


def mean_squared_error(student: Tensor, teacher: Tensor) -> Tensor:
    """The mean over v of (s_v − t_v)², of logits (N, V)."""
    return (student - teacher).square().mean(dim=-1)
