"""Hidden states of a student, drawn to those of its teacher.

Letters: B batch, T length, D student width, E teacher width, M tokens that count.
"""

from collections.abc import Sequence
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neural_layers.distill.losses.outputs import Outputs, widen

Layers = Literal["last", "uniform"] | Sequence[tuple[int, int]]


class StateAlignment(nn.Module):
    """1 − cos(projected student state, teacher state), a mean over the aligned pairs of layers.

    layers: "last", the last layer of each; "uniform", layer i of the student with layer round(i · L_t / L_s) of the
            teacher (halves up); or pairs (student layer, teacher layer), 0 being the embeddings and −1 the last
    of:     "token", the distance of each token, and its mean over those of an example (arXiv 1910.01108); "mean", that
            of the means over an example's tokens
    student_dim, teacher_dim: D and E; where they differ each pair has a learned projection (E, D) without bias
    num_student_layers, num_teacher_layers: L_s and L_t, the embeddings not counted; needed for "uniform"

    Raises ValueError for layers out of range, pairs that are none, and numbers of layers that are missing.
    """

    def __init__(
        self,
        layers: Layers = "last",
        *,
        of: Literal["token", "mean"] = "token",
        student_dim: int,
        teacher_dim: int,
        num_student_layers: int | None = None,
        num_teacher_layers: int | None = None,
    ) -> None:
        super().__init__()
        if of not in ("token", "mean"):
            raise ValueError(f"of={of!r} must be 'token' or 'mean'")
        if student_dim < 1 or teacher_dim < 1:
            raise ValueError(f"student_dim={student_dim} and teacher_dim={teacher_dim} must be at least 1")
        self.pairs = layer_pairs(layers, num_student_layers, num_teacher_layers)
        self.of, self.student_dim, self.teacher_dim = of, student_dim, teacher_dim
        is_projected = student_dim != teacher_dim
        self.projections = nn.ModuleList(
            nn.Linear(student_dim, teacher_dim, bias=False) if is_projected else nn.Identity() for _ in self.pairs
        )

    def forward(self, student: Outputs, teacher: Outputs) -> Tensor:
        """The distance of each example (B), 0 for one without tokens that count.

        Raises ValueError where states are missing, or do not fit each other, the widths or the masks.
        """
        if student.states is None or teacher.states is None:
            missing = "student" if student.states is None else "teacher"
            raise ValueError(f"the {missing}'s outputs have no states, which the cosine part compares; ask for them")
        distances = []
        for (i, j), projection in zip(self.pairs, self.projections, strict=True):
            ours, theirs = _layer(student.states, i, "student"), _layer(teacher.states, j, "teacher")
            self._check(ours, theirs, student.mask, teacher.mask)
            if self.of == "token":
                # A token counts for both or for none.
                mask = student.mask if student.mask is not None else teacher.mask
                distances.append(_token_distance(ours, theirs, mask, projection))
            else:
                distances.append(_mean_distance(ours, theirs, (student.mask, teacher.mask), projection))
        return torch.stack(distances).mean(dim=0)

    def _check(self, ours: Tensor, theirs: Tensor, *masks: Tensor | None) -> None:
        if ours.shape[-1] != self.student_dim or theirs.shape[-1] != self.teacher_dim:
            raise ValueError(
                f"states have widths {ours.shape[-1]} and {theirs.shape[-1]}; expected student_dim={self.student_dim} "
                f"and teacher_dim={self.teacher_dim}"
            )
        if len(ours) != len(theirs) or (self.of == "token" and ours.shape[1] != theirs.shape[1]):
            raise ValueError(
                f"states have shapes {tuple(ours.shape)} and {tuple(theirs.shape)}; teacher and student must read the "
                f"same tokens (of='mean' compares texts of unlike length)"
            )
        for mask, states in zip(masks, (ours, theirs), strict=True):
            if mask is not None and (mask.dtype != torch.bool or mask.shape != states.shape[:2]):
                raise ValueError(
                    f"mask has shape {tuple(mask.shape)} and dtype {mask.dtype}; expected {tuple(states.shape[:2])} "
                    f"of torch.bool"
                )


def layer_pairs(layers: Layers, num_student: int | None, num_teacher: int | None) -> list[tuple[int, int]]:
    """The aligned pairs (student layer, teacher layer); raises ValueError as `StateAlignment` does."""
    if layers == "last":
        return [(-1, -1)]
    if layers == "uniform":
        if not num_student or not num_teacher:
            raise ValueError("layers='uniform' needs num_student_layers and num_teacher_layers, both at least 1")
        return [(i, (2 * i * num_teacher + num_student) // (2 * num_student)) for i in range(1, num_student + 1)]
    if isinstance(layers, str) or not layers:
        raise ValueError(f"layers={layers!r} must be 'last', 'uniform' or pairs (student layer, teacher layer)")
    pairs = [(int(i), int(j)) for i, j in layers]
    for side, (name, count) in enumerate((("student", num_student), ("teacher", num_teacher))):
        for number in (pair[side] for pair in pairs):
            if count is not None and not -count - 1 <= number <= count:
                raise ValueError(f"layers names layer {number} of the {name}, which has 0 … {count}")
    return pairs


def _layer(states: tuple[Tensor, ...], number: int, name: str) -> Tensor:
    if not -len(states) <= number < len(states):
        raise ValueError(f"layers names layer {number} of the {name}, whose states end at {len(states) - 1}")
    return widen(states[number])


def _project(states: Tensor, projection: nn.Module) -> Tensor:
    if isinstance(projection, nn.Linear):
        return F.linear(states, projection.weight.to(states.dtype))
    return states


def _distance(ours: Tensor, theirs: Tensor, projection: nn.Module) -> Tensor:
    return 1 - F.cosine_similarity(_project(ours, projection), theirs, dim=-1)


def _token_distance(ours: Tensor, theirs: Tensor, mask_BT: Tensor | None, projection: nn.Module) -> Tensor:
    if mask_BT is None:
        return _distance(ours, theirs, projection).mean(dim=1)
    # Tokens are taken out, not multiplied by zero: padding may hold anything.
    distances_M = _distance(ours[mask_BT], theirs[mask_BT], projection)
    sums_B = distances_M.new_zeros(len(ours)).index_add(0, mask_BT.nonzero()[:, 0], distances_M)
    return sums_B / mask_BT.sum(dim=1).clamp_min(1)


def _mean_distance(
    ours: Tensor, theirs: Tensor, masks: tuple[Tensor | None, Tensor | None], projection: nn.Module
) -> Tensor:
    distances_B = _distance(_masked_mean(ours, masks[0]), _masked_mean(theirs, masks[1]), projection)
    for mask_BT in masks:
        if mask_BT is not None:
            distances_B = distances_B.masked_fill(~mask_BT.any(dim=1), 0)
    return distances_B


def _masked_mean(states_BTD: Tensor, mask_BT: Tensor | None) -> Tensor:
    if mask_BT is None:
        return states_BTD.mean(dim=1)
    return states_BTD.masked_fill(~mask_BT.unsqueeze(-1), 0).sum(dim=1) / mask_BT.sum(dim=1, keepdim=True).clamp_min(1)
