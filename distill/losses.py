"""The distillation loss.

Letters: B batch, T length, V vocabulary, D student width, E teacher width.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neural_layers.distill.data.batches import IGNORED_LABEL


class DistillationLoss(nn.Module):
    """α·(k·T²·KL(teacher ‖ student) + c·cosine + m·MSE) + β·hard, each a mean over the tokens whose label counts.

      KL      of the softmaxes of logits / T over the vocabulary (arXiv 1503.02531)
      cosine  1 − cos(projected student state, teacher state) of the last hidden states
      MSE     of the logits, a mean over the vocabulary
      hard    cross-entropy with the labels, smoothed by `label_smoothing`

    temperature: T > 0. alpha, beta, kl, cosine, mse: weights ≥ 0, k = 1; zero turns a part off and nothing of it is
    computed.
    student_dim, teacher_dim: the hidden widths, needed for `cosine`; where they differ, student states pass a learned
    projection without bias.

    Raises ValueError for weights or a temperature out of range, for weights that turn every part off, and for `cosine`
    without both widths.
    """

    def __init__(
        self,
        *,
        temperature: float = 6.0,
        alpha: float = 0.8,
        beta: float = 0.2,
        kl: float = 1.0,
        cosine: float = 0.0,
        mse: float = 0.0,
        label_smoothing: float = 0.0,
        student_dim: int | None = None,
        teacher_dim: int | None = None,
    ) -> None:
        super().__init__()
        if not 0 < temperature < math.inf:
            raise ValueError(f"temperature={temperature} must be positive and finite")
        weights = {"alpha": alpha, "beta": beta, "kl": kl, "cosine": cosine, "mse": mse}
        for name, weight in weights.items():
            if not 0 <= weight < math.inf:
                raise ValueError(f"{name}={weight} must be finite and not negative")
        if not beta and not (alpha and (kl or cosine or mse)):
            raise ValueError(f"every part of the loss is turned off: {weights}")
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing={label_smoothing} must lie in [0, 1)")
        if cosine and (student_dim is None or teacher_dim is None):
            raise ValueError(f"cosine={cosine} needs student_dim and teacher_dim")
        self.temperature, self.alpha, self.beta, self.kl = temperature, alpha, beta, kl
        self.cosine, self.mse, self.label_smoothing = cosine, mse, label_smoothing
        is_projected = bool(cosine) and student_dim != teacher_dim
        self.projection = nn.Linear(student_dim or 0, teacher_dim or 0, bias=False) if is_projected else nn.Identity()

    @classmethod
    def cvm(cls, **overrides: Any) -> "DistillationLoss":
        """T = 6, α = 0.8, β = 0.2."""
        return cls(**{"temperature": 6.0, "alpha": 0.8, "beta": 0.2, **overrides})

    @classmethod
    def ntmm(cls, student_dim: int, teacher_dim: int, **overrides: Any) -> "DistillationLoss":
        """T = 3, α = β = 0.5, c = 0.1, m = 0.05."""
        weights = {"temperature": 3.0, "alpha": 0.5, "beta": 0.5, "cosine": 0.1, "mse": 0.05}
        return cls(student_dim=student_dim, teacher_dim=teacher_dim, **{**weights, **overrides})

    @property
    def needs_teacher(self) -> bool:
        """Whether any part looks at the teacher."""
        return self.alpha > 0 and max(self.kl, self.cosine, self.mse) > 0

    @property
    def needs_hidden_states(self) -> bool:
        """Whether any part looks at hidden states."""
        return self.alpha > 0 and self.cosine > 0

    def forward(
        self,
        student_logits: Tensor,
        labels: Tensor,
        teacher_logits: Tensor | None = None,
        student_hidden: Tensor | None = None,
        teacher_hidden: Tensor | None = None,
        num_items: Tensor | int | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted loss, and each part before its weight (T² belongs to `kl`), detached.

        student_logits, teacher_logits: (B, T, V) or (N, V); labels: (B, T) or (N,), −100 where a token does not
        count; hidden states: (B, T, D) and (B, T, E). num_items: what to divide the sums by, by default the number of
        labels that count (give that of all accumulated batches under gradient accumulation).
        Raises ValueError where shapes differ or a part lacks its input.
        """
        if student_logits.shape[:-1] != labels.shape:
            raise ValueError(f"labels have shape {tuple(labels.shape)}; logits {tuple(student_logits.shape)}")
        counted = labels != IGNORED_LABEL
        items = counted.sum() if num_items is None else torch.as_tensor(num_items, device=labels.device)
        items = items.clamp_min(1)  # a batch without labels costs nothing
        # The rows that count, in at least float32: a KL over a vocabulary in half precision loses its digits.
        student = _widen(student_logits[counted])
        parts: dict[str, Tensor] = {}
        if self.beta:
            target = labels[counted]
            parts["hard"] = F.cross_entropy(student, target, reduction="sum", label_smoothing=self.label_smoothing)
        if self.needs_teacher:
            teacher = self._teacher_rows(student_logits, teacher_logits, counted)
            if self.kl:
                parts["kl"] = self._divergence(student, teacher)
            if self.mse:
                parts["mse"] = F.mse_loss(student, teacher, reduction="sum") / student.shape[-1]
        if self.needs_hidden_states:
            if student_hidden is None or teacher_hidden is None:
                raise ValueError(f"cosine={self.cosine} needs student_hidden and teacher_hidden")
            projected = _widen(self.projection(student_hidden[counted]))
            parts["cosine"] = (1 - F.cosine_similarity(projected, _widen(teacher_hidden[counted]), dim=-1)).sum()
        parts = {name: part / items for name, part in parts.items()}
        weights = {
            "hard": self.beta,
            "kl": self.alpha * self.kl,
            "mse": self.alpha * self.mse,
            "cosine": self.alpha * self.cosine,
        }
        total = torch.stack([weights[name] * part for name, part in parts.items()]).sum()
        return total, {name: part.detach() for name, part in parts.items()}

    def _divergence(self, student: Tensor, teacher: Tensor) -> Tensor:
        log_student = F.log_softmax(student / self.temperature, dim=-1)
        log_teacher = F.log_softmax(teacher / self.temperature, dim=-1)
        # T² keeps the gradient's size independent of the temperature.
        return self.temperature**2 * F.kl_div(log_student, log_teacher, reduction="sum", log_target=True)

    def _teacher_rows(self, student_logits: Tensor, teacher_logits: Tensor | None, counted: Tensor) -> Tensor:
        if teacher_logits is None:
            raise ValueError(f"alpha={self.alpha} needs teacher_logits")
        if teacher_logits.shape != student_logits.shape:
            raise ValueError(
                f"teacher logits have shape {tuple(teacher_logits.shape)}, the student's "
                f"{tuple(student_logits.shape)}; both must share one vocabulary"
            )
        return _widen(teacher_logits[counted])


def _widen(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
