"""The distillation loss: its weights, and its parts put together.

Letters: B batch, T length, N labels that count, V vocabulary.
"""

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from neural_layers.distill.data.batches import IGNORED_LABEL
from neural_layers.distill.losses import parts as sums
from neural_layers.distill.losses.divergences import DIVERGENCES
from neural_layers.distill.losses.outputs import Outputs
from neural_layers.distill.losses.schedule import Schedule
from neural_layers.distill.losses.states import StateAlignment


class DistillationLoss(nn.Module):
    """α·(k·T²·divergence(teacher, student) + c·cosine + m·MSE) + β·hard, each a mean over the labels that count.

      kl      of the softmaxes of logits / T over the vocabulary: KL(teacher ‖ student) for "forward" (arXiv
              1503.02531), KL(student ‖ teacher) for "reverse" (2306.08543), the mean of the KLs to their mixture for
              "jsd" (2306.13649, weight ½)
      cosine  1 − cos(projected student state, teacher state) of the layers that `states` aligns; an example's distance
              counts as often as it has labels that count
      mse     of the logits, a mean over the vocabulary
      hard    cross-entropy with the labels, smoothed by `label_smoothing`

    temperature, alpha, beta: numbers, T > 0 and weights ≥ 0, or schedules of them (`Schedule`, or its text, as
        "0.9:0.5"), which follow `progress` (0 … 1, set before each step)
    kl, cosine, mse: weights k, c, m ≥ 0; zero turns a part off and nothing of it is computed
    states: what the cosine compares; learned projections inside are this module's only parameters
    class_weights: (V,), what an example's hard loss is multiplied by; a mean of 1 over the examples keeps its size

    Raises ValueError for weights or a temperature out of range, for weights that turn every part off, for `cosine`
    without `states`, and for an unknown divergence.
    """

    class_weights: Tensor | None

    def __init__(
        self,
        *,
        temperature: float | str | Schedule = 6.0,
        alpha: float | str | Schedule = 0.8,
        beta: float | str | Schedule = 0.2,
        kl: float = 1.0,
        cosine: float = 0.0,
        mse: float = 0.0,
        label_smoothing: float = 0.0,
        divergence: Literal["forward", "reverse", "jsd"] = "forward",
        states: StateAlignment | None = None,
        class_weights: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.schedules = {
            "temperature": _schedule("temperature", temperature),
            "alpha": _schedule("alpha", alpha),
            "beta": _schedule("beta", beta),
        }
        self.kl, self.cosine, self.mse = _weight("kl", kl), _weight("cosine", cosine), _weight("mse", mse)
        self.label_smoothing, self.divergence = label_smoothing, divergence
        self._progress = 0.0
        self._refuse_nothing()
        if not 0 <= label_smoothing < 1:
            raise ValueError(f"label_smoothing={label_smoothing} must lie in [0, 1)")
        if divergence not in DIVERGENCES:
            raise ValueError(f"divergence={divergence!r} must be one of {', '.join(DIVERGENCES)}")
        if cosine and states is None:
            raise ValueError(f"cosine={cosine} needs states=StateAlignment(…), which says what it compares")
        # Without the cosine a projection would never get a gradient.
        self.states = states if self.cosine else None
        self.register_buffer("class_weights", _checked_class_weights(class_weights), persistent=False)

    @classmethod
    def cvm(cls, **overrides: Any) -> "DistillationLoss":
        """T = 6, α = 0.8, β = 0.2."""
        return cls(**{"temperature": 6.0, "alpha": 0.8, "beta": 0.2, **overrides})

    @classmethod
    def ntmm(cls, student_dim: int, teacher_dim: int, **overrides: Any) -> "DistillationLoss":
        """T = 3, α = β = 0.5, c = 0.1 of the last layers' means over an example, m = 0.05, labels smoothed by 0.1."""
        weights = {"temperature": 3.0, "alpha": 0.5, "beta": 0.5, "cosine": 0.1, "mse": 0.05, "label_smoothing": 0.1}
        chosen = {**weights, **overrides}
        if chosen["cosine"] and chosen.get("states") is None:
            chosen["states"] = StateAlignment("last", of="mean", student_dim=student_dim, teacher_dim=teacher_dim)
        return cls(**chosen)

    @property
    def progress(self) -> float:
        """How much of the training is done, 0 … 1; raises ValueError where set to anything else."""
        return self._progress

    @progress.setter
    def progress(self, progress: float) -> None:
        if not 0 <= progress <= 1:
            raise ValueError(f"progress={progress} must lie in [0, 1]")
        self._progress = float(progress)

    @property
    def temperature(self) -> float:
        """T at this progress."""
        return self.schedules["temperature"].at(self._progress)

    @property
    def alpha(self) -> float:
        """α at this progress."""
        return self.schedules["alpha"].at(self._progress)

    @property
    def beta(self) -> float:
        """β at this progress."""
        return self.schedules["beta"].at(self._progress)

    @property
    def needs_teacher(self) -> bool:
        """Whether any part looks at the teacher, at any progress."""
        return max(self.schedules["alpha"].ends) > 0 and max(self.kl, self.cosine, self.mse) > 0

    @property
    def needs_states(self) -> bool:
        """Whether any part looks at hidden states, at any progress."""
        return self.needs_teacher and self.cosine > 0

    def forward(
        self,
        student: Outputs,
        labels: Tensor,
        teacher: Outputs | None = None,
        num_items: Tensor | int | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted loss, and each part before its weight (T² belongs to `kl`), detached.

        labels: (B, T), (B,) or (N,), −100 where one does not count; outputs have the labels' shape and one dimension
        more. teacher: gets no gradient. num_items: what to divide the sums by, by default the number of labels that
        count (give that of all accumulated batches under gradient accumulation). Without labels that count the loss is
        zero, and so are its gradients.
        Raises ValueError where shapes or vocabularies differ or a part lacks its input.
        """
        counted = labels != IGNORED_LABEL
        items = counted.sum() if num_items is None else torch.as_tensor(num_items, device=labels.device)
        weights = self._weights()
        is_taught = bool(weights.keys() - {"hard"})
        teacher = self._checked(student, teacher).detached() if is_taught else None
        found: dict[str, Tensor] = {}
        if weights.keys() - {"cosine"}:
            of_rows = teacher if weights.keys() & {"kl", "mse"} else None
            found = self._sums_of_rows(student, labels, of_rows, counted)
        if teacher is not None and self.states is not None:
            found["cosine"] = self._sum_of_states(student, teacher, counted)
        found = {name: part / items.clamp_min(1) for name, part in found.items()}
        total = torch.stack([weights[name] * part for name, part in found.items()]).sum()
        return total, {name: part.detach() for name, part in found.items()}

    def _sums_of_rows(
        self, student: Outputs, labels: Tensor, teacher: Outputs | None, counted: Tensor
    ) -> dict[str, Tensor]:
        """The parts that look at the logits of each label that counts."""
        rows, found = student.rows(counted), {}
        if self.beta:
            found["hard"] = sums.hard_sum(rows, labels[counted], self.label_smoothing, self.class_weights)
        if teacher is not None:
            teacher_rows = teacher.rows(counted)
            if self.kl:
                found["kl"] = sums.divergence_sum(rows, teacher_rows, self.divergence, self.temperature)
            if self.mse:
                found["mse"] = sums.squared_error_sum(rows, teacher_rows)
        return found

    def _sum_of_states(self, student: Outputs, teacher: Outputs, counted: Tensor) -> Tensor:
        """Σ over examples of their distance times their number of labels that count."""
        assert self.states is not None
        distances_B = self.states(student, teacher)
        if len(distances_B) != len(counted):
            raise ValueError(f"states are of {len(distances_B)} examples, labels of {len(counted)}; keep the batch")
        return (distances_B * counted.reshape(len(counted), -1).sum(dim=1)).sum()

    def _weights(self) -> dict[str, float]:
        """The weight of each part that is on."""
        alpha = self.alpha
        weights = {"hard": self.beta, "kl": alpha * self.kl, "mse": alpha * self.mse, "cosine": alpha * self.cosine}
        return {name: weight for name, weight in weights.items() if weight}

    def _refuse_nothing(self) -> None:
        for progress in (0.0, 1.0):
            self._progress = progress
            if not self._weights():
                weights = {name: str(self.schedules[name]) for name in ("alpha", "beta")}
                weights |= {name: str(getattr(self, name)) for name in ("kl", "cosine", "mse")}
                given = ", ".join(f"{name}={weight}" for name, weight in weights.items())
                raise ValueError(
                    f"every part of the loss is turned off (at progress {progress:.0f}): {given}; turn one on"
                )
        self._progress = 0.0

    def _checked(self, student: Outputs, teacher: Outputs | None) -> Outputs:
        if teacher is None:
            raise ValueError(f"alpha={self.alpha} needs the teacher's outputs; give them, or alpha=0")
        if teacher.cached is not None:
            used = [f"{name}={weight}" for name, weight in (("cosine", self.cosine), ("mse", self.mse)) if weight]
            if used:
                raise ValueError(
                    f"a teacher cache holds neither hidden states nor all logits, which {' and '.join(used)} would "
                    f"compare; set them to 0, or train without the cache"
                )
            if self.temperature != teacher.cached.temperature:
                raise ValueError(
                    f"temperature={self.temperature}, and the teacher cache was built for "
                    f"{teacher.cached.temperature}; use that, or build another cache"
                )
        if (self.kl or self.mse) and student.vocabulary != teacher.vocabulary:
            raise ValueError(
                f"the teacher's vocabulary has {teacher.vocabulary} entries and the student's {student.vocabulary}; "
                f"both must share one vocabulary"
            )
        return teacher


def _schedule(name: str, value: float | str | Schedule) -> Schedule:
    """Raises ValueError where an end is out of range."""
    if not isinstance(value, str | Schedule):
        _check_range(name, value)
    schedule = Schedule.parse(value)
    for number in schedule.ends:
        _check_range(name, number)
    return schedule


def _check_range(name: str, number: float) -> None:
    if name != "temperature":
        _weight(name, number)
    elif not 0 < number < math.inf:
        raise ValueError(f"temperature={number} must be positive and finite")


def _weight(name: str, weight: float) -> float:
    if not 0 <= weight < math.inf:
        raise ValueError(f"{name}={weight} must be finite and not negative")
    return weight


def _checked_class_weights(weights: Tensor | None) -> Tensor | None:
    if weights is None:
        return None
    weights = torch.as_tensor(weights)
    if weights.ndim != 1 or not weights.isfinite().all() or (weights < 0).any() or not (weights > 0).any():
        raise ValueError(f"class_weights={weights.tolist()} must be one finite number ≥ 0 for each class, not all 0")
    return weights.float() if not weights.is_floating_point() else weights
