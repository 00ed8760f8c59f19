"""How far the divergence over a cache's cells lies from that over the whole vocabulary, measured.

Letters: n rows, V vocabulary.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from neural_layers.distill.losses.divergences import forward_kl
from neural_layers.distill.losses.top_k import TopK, top_k_divergence


@dataclass
class CacheError:
    """The teacher's mass outside the cache of every row, and T²·KL exact and cached on a sample of rows.

    The sample is compared with a student's logits, or with the uniform distribution.
    """

    against: str
    outside_sum: float = 0.0
    outside_max: float = 0.0
    rows: int = 0
    exact: list[float] = field(default_factory=list)
    cached: list[float] = field(default_factory=list)

    def add(self, rest: Tensor) -> None:
        """Rows (n) of the log mass outside."""
        outside = rest.double().exp()
        self.rows += len(rest)
        self.outside_sum += outside.sum().item()
        self.outside_max = max(self.outside_max, outside.max().item())

    def compare(self, teacher: Tensor, stored: TopK, student: Tensor | None) -> None:
        """Logits (n, V) of the teacher and of a student, and what is stored of the former, as it is read again."""
        temperature = stored.temperature
        teacher = teacher.double() / temperature
        student = torch.zeros_like(teacher) if student is None else student.double() / temperature
        exact = forward_kl(student.log_softmax(dim=-1), teacher.log_softmax(dim=-1))
        rows = torch.arange(len(teacher), device=teacher.device)
        cached = top_k_divergence(forward_kl, student, stored, rows)
        self.exact += (temperature**2 * exact).tolist()
        self.cached += (temperature**2 * cached).tolist()

    def result(self) -> dict[str, float | int | str]:
        """For `meta.json`."""
        exact, cached = (torch.tensor(values, dtype=torch.float64) for values in (self.exact, self.cached))
        difference = (cached - exact).abs()
        mean = exact.mean().item()
        return {
            "outside_mean": self.outside_sum / self.rows,
            "outside_max": self.outside_max,
            "against": self.against,
            "rows": len(exact),
            "exact": mean,
            "cached": cached.mean().item(),
            "relative": (cached.mean().item() - mean) / mean if mean > 0 else 0.0,
            "largest_difference": difference.max().item(),
        }
