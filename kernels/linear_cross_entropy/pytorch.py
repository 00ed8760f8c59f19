"""The cross-entropy of a linear layer's outputs in chunks of tokens (implementation `torch`).

Letters: T tokens of all sequences, C tokens of a chunk, V vocabulary.
"""

import torch
from torch import Tensor

from neural_layers.kernels.chunked_loss import Head
from neural_layers.kernels.chunked_loss.pytorch import chunked_mean, softmax_
from neural_layers.kernels.linear_cross_entropy.reference import check_range


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
    return chunked_mean([head], tokens, formula, chunk_size=chunk_size)


def cross_entropy(logits_CV: Tensor, target_C: Tensor, label_smoothing: float, wants_gradient: bool) -> Tensor:
    """log Σ exp(s) − (1 − ε) s[target] − ε · mean(s), and its gradient softmax(s) − (1 − ε) [v = target] − ε / V."""
    target_C1 = target_C.unsqueeze(1)
    expected_C1 = logits_CV.gather(1, target_C1)
    if label_smoothing:
        expected_C1 = torch.lerp(expected_C1, logits_CV.mean(dim=1, keepdim=True), label_smoothing)
    losses_C1 = softmax_(logits_CV) - expected_C1
    if wants_gradient:
        if label_smoothing:
            logits_CV -= label_smoothing / logits_CV.shape[1]
        # Not scatter_add_, which CUDA does in an order of its own.
        logits_CV.scatter_(1, target_C1, logits_CV.gather(1, target_C1) - (1 - label_smoothing))
    return losses_C1.squeeze(1)
