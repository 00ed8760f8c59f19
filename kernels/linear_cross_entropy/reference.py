"""The definition of the cross-entropy of a linear layer's outputs, in plain arithmetic on all the logits."""

import torch
from torch import Tensor

from neural_layers.kernels.arguments import accumulation_dtype


def linear_cross_entropy_reference(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    chunk_size: int | None = None,
) -> Tensor:
    """−mean over the tokens that count of (1 − ε) log p[target] + ε · mean over v of log p[v]; p = softmax(h Wᵀ).

    chunk_size changes nothing here: all the logits are there at once.
    """
    dtype = accumulation_dtype(hidden, weight)
    counts = target != ignore_index
    if not torch.compiler.is_compiling():
        check_range(target[counts], weight.shape[0], ignore_index)
    # Filled before the product, so that nothing in a row that does not count reaches a gradient.
    hidden = hidden.to(dtype).masked_fill(~counts.unsqueeze(-1), 0)
    log_p = torch.log_softmax(hidden @ weight.to(dtype).T, dim=-1)
    log_p_target = log_p.gather(-1, target.masked_fill(~counts, 0).unsqueeze(-1)).squeeze(-1)
    losses = -log_p_target
    if label_smoothing:
        losses = (1 - label_smoothing) * losses - label_smoothing * log_p.mean(dim=-1)
    return losses.masked_fill(~counts, 0).sum() / counts.sum()


def check_range(target_N: Tensor, vocabulary: int, ignore_index: int) -> None:
    """Raise ValueError for a target that is no row of the weight."""
    is_wrong_N = (target_N < 0) | (target_N >= vocabulary)
    if is_wrong_N.any():
        raise ValueError(
            f"target holds {target_N[is_wrong_N][0].item()}; expected 0 ≤ target < V={vocabulary}, or "
            f"ignore_index={ignore_index}"
        )
