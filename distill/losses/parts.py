"""The parts of a distillation loss, as sums over rows of labels that count.

Each has two routes that give the same: from logits, or, where the outputs carry hidden states and head, chunk by chunk
without ever having the logits of all rows.

Letters: N rows, V vocabulary.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from neural_layers.distill.losses.chunked import chunked_sum, no_rows
from neural_layers.distill.losses.divergences import DIVERGENCES, Divergence, mean_squared_error
from neural_layers.distill.losses.outputs import Outputs
from neural_layers.distill.losses.top_k import TopK, top_k_divergence
from neural_layers.functional import linear_cross_entropy, linear_kl_div


def hard_sum(student: Outputs, labels_N: Tensor, label_smoothing: float, class_weights: Tensor | None) -> Tensor:
    """Σ of the cross-entropies with the labels, each times its class's weight.

    Raises ValueError for labels out of range, and for class weights that are not (V,) or come with a head.
    """
    if student.hidden is not None and student.head is not None:
        if class_weights is not None:
            raise ValueError("class_weights are for classifiers; give logits instead of hidden and head, or leave them")
        if not len(labels_N):
            return no_rows(student.hidden, student.head)
        mean = linear_cross_entropy(student.hidden, student.head, labels_N, label_smoothing=label_smoothing)
        return mean * len(labels_N)
    vocabulary = student.vocabulary
    is_wrong_N = (labels_N < 0) | (labels_N >= vocabulary)
    if is_wrong_N.any():
        wrong = labels_N[is_wrong_N][0].item()
        raise ValueError(f"labels hold {wrong}; expected 0 ≤ label < {vocabulary}, or −100 for one that does not count")
    if class_weights is not None and class_weights.shape != (vocabulary,):
        raise ValueError(f"class_weights have shape {tuple(class_weights.shape)}; expected ({vocabulary},)")
    logits = student.all_logits()
    weights = None if class_weights is None else class_weights.to(logits)
    return F.cross_entropy(logits, labels_N, weights, reduction="sum", label_smoothing=label_smoothing)


def divergence_sum(student: Outputs, teacher: Outputs, kind: str, temperature: float) -> Tensor:
    """T² · Σ of the divergences of softmax(logits / T)."""
    divergence, scale = DIVERGENCES[kind], 1 / temperature
    if teacher.cached is not None:
        return temperature**2 * _cached_sum(student, teacher.cached, divergence, scale)
    if student.hidden is None or student.head is None or teacher.hidden is None or teacher.head is None:
        log_q = torch.log_softmax(student.all_logits() * scale, dim=-1)
        log_p = torch.log_softmax(teacher.all_logits() * scale, dim=-1)
        return temperature**2 * divergence(log_q, log_p).sum()
    if not len(student.hidden):
        return no_rows(student.hidden, student.head)
    if kind == "forward":
        heads = (student.hidden, student.head, teacher.hidden, teacher.head)
        return linear_kl_div(*heads, temperature=temperature) * len(student.hidden)

    def of_rows(logits: Tensor, others: list[Tensor], rows: Tensor) -> Tensor:
        return divergence(torch.log_softmax(logits, dim=-1), torch.log_softmax(others[0], dim=-1))

    others = (teacher.hidden, teacher.head)
    return temperature**2 * chunked_sum(of_rows, student.hidden, student.head, others, scale=scale)


def _cached_sum(student: Outputs, teacher: TopK, divergence: Divergence, scale: float) -> Tensor:
    if student.hidden is not None and student.head is not None:
        of_rows = lambda logits, others, rows: top_k_divergence(divergence, logits, teacher, rows)  # noqa: E731
        return chunked_sum(of_rows, student.hidden, student.head, scale=scale)
    rows = torch.arange(len(teacher), device=teacher.indices.device)
    return top_k_divergence(divergence, student.all_logits() * scale, teacher, rows).sum()


def squared_error_sum(student: Outputs, teacher: Outputs) -> Tensor:
    """Σ of the mean squared differences of the logits."""
    if student.hidden is None or student.head is None or teacher.hidden is None or teacher.head is None:
        return mean_squared_error(student.all_logits(), teacher.all_logits()).sum()
    of_rows = lambda logits, others, rows: mean_squared_error(logits, others[0])  # noqa: E731
    return chunked_sum(of_rows, student.hidden, student.head, (teacher.hidden, teacher.head))
