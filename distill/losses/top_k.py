"""Divergences from a teacher of whom only the k largest logits are known, and the mass of all the others.

The vocabulary is divided into k + 1 cells: each of the k entries, and all the rest. The divergence of the distributions
over these cells takes the place of that over the vocabulary,

    KL' = Σ_{i ∈ top k} p_i (log p_i − log q_i) + r (log r − log s),  r = 1 − Σ p_i,  s = 1 − Σ q_i

It is a lower bound of the exact one by the data-processing inequality, for every divergence here, and is exact where
k = V. s is summed over the entries outside: 1 − Σ q_i would lose all its digits where the student is sure.

Letters: N rows, k entries, V vocabulary.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from neural_layers.distill.losses.divergences import Divergence


@dataclass(frozen=True)
class TopK:
    """The largest logits of a teacher for N rows.

    indices: (N, k) of int64, each row without repetition; logits: (N, k), up to a constant of each row
    rest:    (N), log of the mass outside at `temperature`, −∞ where k = V
    Raises ValueError where shapes do not fit.
    """

    indices: Tensor
    logits: Tensor
    rest: Tensor
    temperature: float
    vocabulary: int

    def __post_init__(self) -> None:
        if self.indices.shape != self.logits.shape or self.rest.shape != self.indices.shape[:1]:
            raise ValueError(
                f"indices {tuple(self.indices.shape)}, logits {tuple(self.logits.shape)} and rest "
                f"{tuple(self.rest.shape)} do not fit; expected (N, k), (N, k) and (N,)"
            )
        if self.indices.shape[1] > self.vocabulary:
            raise ValueError(f"k={self.indices.shape[1]} entries are more than the vocabulary={self.vocabulary} has")

    def __len__(self) -> int:
        return len(self.indices)

    def to(self, device: torch.device | str) -> "TopK":
        """The same on another device."""
        indices, logits, rest = (tensor.to(device) for tensor in (self.indices, self.logits, self.rest))
        return TopK(indices, logits, rest, self.temperature, self.vocabulary)

    def log_cells(self, rows: Tensor, dtype: torch.dtype) -> Tensor:
        """log p of the cells (n, k + 1) of these rows at the cache's temperature; (n, k) where k = V."""
        log_inside = torch.log_softmax(self.logits[rows].to(dtype) / self.temperature, dim=-1)
        if self.is_complete:
            return log_inside
        rest = self.rest[rows].to(dtype).unsqueeze(-1)
        return torch.cat([log_inside + log1mexp(rest), rest], dim=-1)

    @property
    def is_complete(self) -> bool:
        """Whether nothing is left out."""
        return self.indices.shape[1] == self.vocabulary


def log1mexp(log_x: Tensor) -> Tensor:
    """log(1 − x) of log x < 0, accurate for x near 0 and near 1 alike."""
    # Near 0 expm1 has the digits of 1 − x; far from it log1p has those of a small x (Mächler 2012).
    is_near_one = log_x > -0.6931
    return torch.where(is_near_one, (-torch.expm1(log_x)).log(), torch.log1p(-log_x.exp()))


def student_cells(logits: Tensor, indices: Tensor, is_complete: bool) -> Tensor:
    """log q of the cells (N, k + 1), from logits (N, V) at the temperature of the comparison."""
    log_q = torch.log_softmax(logits, dim=-1)
    inside = log_q.gather(-1, indices)
    if is_complete:
        return inside
    rest = log_q.scatter(-1, indices, -torch.inf).logsumexp(dim=-1, keepdim=True)
    return torch.cat([inside, rest], dim=-1)


def top_k_divergence(divergence: Divergence, logits: Tensor, teacher: TopK, rows: Tensor) -> Tensor:
    """The divergence over the cells for `rows` (n) of the teacher; logits: (n, V) ÷ the temperature. Returns (n)."""
    log_q = student_cells(logits, teacher.indices[rows], teacher.is_complete)
    return divergence(log_q, teacher.log_cells(rows, log_q.dtype))
