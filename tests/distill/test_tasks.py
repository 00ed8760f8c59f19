"""CausalTask: the loss of packed documents is that of the documents alone, in float64 and without chunks."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

pytest.importorskip("transformers", reason="transformers is not installed")

from neural_layers.distill.losses import DistillationLoss, StateAlignment
from neural_layers.distill.tasks import CausalTask
from neural_layers.distill.text.packing import pack
from neural_layers.distill.text.sampling import collate
from neural_layers.models.hybrid import HybridConfig, HybridForCausalLM

VOCABULARY, LENGTH, TEMPERATURE = 23, 24, 2.5


def make_model(seed: int, width: int, layers: list[str]) -> HybridForCausalLM:
    torch.manual_seed(seed)
    sizes = {"hidden_size": width, "intermediate_size": 12, "num_hidden_layers": len(layers), "mixers": layers}
    config = HybridConfig(vocab_size=VOCABULARY, num_attention_heads=2, initializer_range=0.3, **sizes)
    return HybridForCausalLM(config).double().eval()


STUDENT, TEACHER = (
    make_model(0, 8, ["mamba", "attention"]),
    make_model(1, 12, ["attention", "mamba", "sliding_attention"]),
)


def documents(starts: list[int]) -> list[tuple[int, int]]:
    edges = sorted({0, *starts, LENGTH})
    return list(itertools.pairwise(edges))


def batch_of(rows: list[list[int]], seed: int) -> dict[str, torch.Tensor]:
    tokens = np.random.default_rng(seed).integers(VOCABULARY, size=(len(rows), LENGTH))
    return collate([pack(ids, np.array(starts, dtype=np.int64)) for ids, starts in zip(tokens, rows, strict=True)])


def plain_loss(batch: dict[str, torch.Tensor], rows: list[list[int]], divergence: str) -> float:
    """0.7 · T² · divergence + 0.3 · cross-entropy, document by document and token by token."""
    total, count = 0.0, 0
    for ids, starts in zip(batch["input_ids"], rows, strict=True):
        for begin, end in documents(starts):
            ours, theirs = (m(ids[None, begin:end]).logits[0] for m in (STUDENT, TEACHER))
            for t in range(end - begin - 1):
                p, q = (F.softmax(one[t] / TEMPERATURE, -1) for one in (theirs, ours))
                kl = {"forward": (p * (p / q).log()).sum(), "reverse": (q * (q / p).log()).sum()}[divergence]
                hard = -F.log_softmax(ours[t], -1)[ids[begin + t + 1]]
                total += float(0.7 * TEMPERATURE**2 * kl + 0.3 * hard)
                count += 1
    return total / max(count, 1)


def task_loss(batch: dict[str, torch.Tensor], divergence: str = "forward", **seen: torch.Tensor) -> float:
    task, loss = CausalTask(), DistillationLoss(temperature=TEMPERATURE, alpha=0.7, beta=0.3, divergence=divergence)
    ours, theirs = (task.outputs(model, {**batch, **seen}, False) for model in (STUDENT, TEACHER))
    assert ours.logits is None  # the logits of all tokens are never there at once
    assert theirs.logits is None
    return float(loss(ours, task.labels(batch), theirs)[0])


borders = st.lists(st.lists(st.integers(1, LENGTH - 1), max_size=4), min_size=2, max_size=3)


@torch.no_grad()
@settings(max_examples=6, deadline=None, derandomize=True, database=None)
@given(rows=borders, seed=st.integers(0, 99), divergence=st.sampled_from(["forward", "reverse"]))
def test_the_loss_of_packed_documents_is_that_of_each_alone(rows, seed, divergence) -> None:
    batch = batch_of(rows, seed)
    assert task_loss(batch, divergence) == pytest.approx(plain_loss(batch, rows, divergence), rel=1e-9)


@torch.no_grad()
def test_a_teacher_that_saw_across_a_border_would_be_found() -> None:
    rows = [[7, 15], [11]]
    batch = batch_of(rows, 3)
    expected = plain_loss(batch, rows, "forward")
    leaking = {"seq_idx": torch.zeros_like(batch["seq_idx"]), "position_ids": torch.arange(LENGTH).expand(2, LENGTH)}
    assert task_loss(batch, **leaking) != pytest.approx(expected, rel=1e-3)
    assert task_loss(batch) == pytest.approx(expected, rel=1e-9)


def test_labels_are_the_next_tokens_and_none_at_a_border() -> None:
    batch = batch_of([[5], []], 0)
    labels, ids = CausalTask().labels(batch), batch["input_ids"]
    assert labels[0, 4] == labels[0, -1] == labels[1, -1] == -100
    assert torch.equal(labels[1, :-1], ids[1, 1:])
    assert torch.equal(labels[0, :4], ids[0, 1:5])
    assert int((labels != -100).sum()) == 2 * LENGTH - 3
    # As many as Trainer counts in the labels that are not shifted, by which it divides.
    assert int((labels != -100).sum()) == int((batch["labels"] != -100).sum())


@torch.no_grad()
def test_the_cosine_compares_the_states_of_every_token() -> None:
    task, batch = CausalTask(), batch_of([[9], [4, 20]], 5)
    align = StateAlignment("last", of="token", student_dim=8, teacher_dim=12).double()
    loss = DistillationLoss(temperature=1.0, alpha=1.0, beta=1.0, cosine=0.5, states=align)
    ours, theirs = (task.outputs(model, batch, True) for model in (STUDENT, TEACHER))
    _, parts = loss(ours, task.labels(batch), theirs)
    projected = ours.states[-1] @ align.projections[0].weight.T
    distance = 1 - F.cosine_similarity(projected, theirs.states[-1], dim=-1).mean(dim=1)
    counted = (task.labels(batch) != -100).sum(dim=1)
    assert float(parts["cosine"]) == pytest.approx(float((distance * counted).sum() / counted.sum()), rel=1e-9)
    assert math.isfinite(float(parts["kl"]))
