"""Which weights go: each method as a function from a weight and the mask before to the mask after.

Masks are bool tensors of the weight's shape, true where a weight counts. A weight that was pruned stays pruned.
"""

from collections.abc import Sequence

import torch
from torch import Tensor


def smallest(scores: Tensor, count: int) -> Tensor:
    """True for the `count` smallest of all scores; of equal ones the first. Bool, of the shape of `scores`."""
    flat = scores.flatten()
    if count == 0:
        return torch.zeros_like(scores, dtype=torch.bool)
    threshold = flat.kthvalue(count).values
    is_small = flat < threshold
    ties = (flat == threshold).nonzero().flatten()
    is_small[ties[: count - int(is_small.sum())]] = True
    return is_small.view_as(scores)


def magnitudes(weight: Tensor) -> Tensor:
    """|w|, in float32 or, for float64 weights, in float64."""
    return weight.detach().abs().to(torch.promote_types(weight.dtype, torch.float32))


def random_scores(weights: Sequence[Tensor], seed: int) -> list[Tensor]:
    """Uniform scores in [0, 1), the same for a seed on every device."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.rand(w.shape, generator=generator, dtype=torch.float64).to(w.device) for w in weights]


def keep_largest(scores: Tensor, before: Tensor, count: int) -> Tensor:
    """The mask in which `count` weights are pruned: those that were before, and the smallest of the others."""
    return ~smallest(scores.masked_fill(~before, -1.0), count)


def keep_largest_slices(weight: Tensor, before: Tensor, count: int, n: float, dim: int) -> Tensor:
    """The mask in which `count` slices along `dim` are pruned, those of the smallest norm ‖·‖_n (L_n of arXiv
    1608.08710) after those that were before."""
    others = [i for i in range(weight.ndim) if i != dim]
    norms = torch.linalg.vector_norm(magnitudes(weight) * before, n, dim=others)
    norms = norms.masked_fill(~before.any(dim=others), -1.0)
    shape = [-1 if i == dim else 1 for i in range(weight.ndim)]
    return before & ~smallest(norms, count).view(shape)


def keep_n_of_m(weight: Tensor, before: Tensor, n: int, m: int) -> Tensor:
    """The mask that keeps the n largest of each m consecutive inputs of a (out, in) weight (arXiv 2104.08378)."""
    grouped = magnitudes(weight).masked_fill(~before, -1.0).unflatten(1, (-1, m))
    # A stable order, so that of equal magnitudes the first inputs are pruned, as everywhere here.
    order = grouped.argsort(dim=-1, stable=True)
    pruned = torch.zeros_like(grouped, dtype=torch.bool).scatter(-1, order[..., : m - n], value=True)
    return before & ~pruned.flatten(1)
