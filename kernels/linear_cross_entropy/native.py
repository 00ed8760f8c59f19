"""The cross-entropy of a linear layer's outputs in C (implementation `native`).

Letters: T tokens of all sequences, C tokens of a chunk, V vocabulary, J blocks of the vocabulary.
"""

import torch
from torch import Tensor

from neural_layers.kernels.chunked_loss import Head
from neural_layers.kernels.chunked_loss.native import Formula, chunked_mean
from neural_layers.kernels.linear_cross_entropy.reference import check_range

_CODE = 0


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

    def combine(statistics: Tensor, logits: list[Tensor], tokens_C: Tensor) -> tuple[Tensor, Tensor]:
        return _combine(statistics, logits[0], target_T[tokens_C], label_smoothing)

    formula = Formula(_CODE, combine, target_T, label_smoothing / len(weight), 1 - label_smoothing)
    return chunked_mean([Head(hidden, weight, *wants)], tokens, formula, chunk_size=chunk_size)


def _combine(statistics: Tensor, logits_VC: Tensor, target_C: Tensor, smoothing: float) -> tuple[Tensor, Tensor]:
    """log Σ exp(s) − (1 − ε) s[target] − ε · mean(s)."""
    max_JC, sum_JC, linear_JC = statistics.unbind(1)[:3]
    max_C = max_JC.amax(0)
    sum_C = (sum_JC * (max_JC - max_C).exp()).sum(0)
    expected_C = logits_VC.gather(0, target_C.unsqueeze(0)).squeeze(0).double()
    if smoothing:
        expected_C = torch.lerp(expected_C, linear_JC.sum(0) / len(logits_VC), smoothing)
    losses_C = max_C + sum_C.log() - expected_C
    unused_C = torch.zeros_like(max_C)
    return losses_C, torch.stack([max_C, 1 / sum_C, unused_C, unused_C, unused_C])
