"""DistillationLoss against its formula, written out row by row."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from neural_layers.distill.losses import DistillationLoss


def randn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def written_out(loss, student, labels, teacher, student_hidden, teacher_hidden) -> dict[str, float]:
    """Each part as a mean over the counted tokens, in plain loops."""
    parts, count = {"kl": 0.0, "hard": 0.0, "mse": 0.0, "cosine": 0.0}, 0
    temperature, smoothing = loss.temperature, loss.label_smoothing
    for b in range(labels.shape[0]):
        for t in range(labels.shape[1]):
            if labels[b, t] == -100:
                continue
            count += 1
            p, q = (teacher[b, t] / temperature).softmax(-1), (student[b, t] / temperature).softmax(-1)
            parts["kl"] += temperature**2 * (p * (p.log() - q.log())).sum()
            log_q = student[b, t].log_softmax(-1)
            parts["hard"] -= (1 - smoothing) * log_q[labels[b, t]] + smoothing * log_q.mean()
            parts["mse"] += ((student[b, t] - teacher[b, t]) ** 2).mean()
            projected, target = loss.projection(student_hidden[b, t]), teacher_hidden[b, t]
            parts["cosine"] += 1 - projected @ target / projected.norm() / target.norm()
    return {name: part / max(count, 1) for name, part in parts.items()}


@given(
    temperature=st.sampled_from([1.0, 2.5, 6.0]),
    smoothing=st.sampled_from([0.0, 0.1]),
    teacher_dim=st.sampled_from([4, 6]),
    seed=st.integers(0, 99),
)
def test_loss_is_its_formula_in_value_and_gradient(temperature, smoothing, teacher_dim, seed) -> None:
    torch.manual_seed(seed)
    loss = DistillationLoss(
        temperature=temperature,
        alpha=0.7,
        beta=0.4,
        cosine=0.3,
        mse=0.2,
        label_smoothing=smoothing,
        student_dim=4,
        teacher_dim=teacher_dim,
    ).double()
    student, teacher = randn(seed, 2, 5, 7).requires_grad_(), randn(seed + 1, 2, 5, 7)
    hidden = randn(seed + 2, 2, 5, 4).requires_grad_()
    teacher_hidden = randn(seed + 3, 2, 5, teacher_dim)
    labels = torch.randint(0, 7, (2, 5), generator=torch.Generator().manual_seed(seed))
    labels[0, 3:] = -100

    total, parts = loss(student, labels, teacher, hidden, teacher_hidden)
    expected = written_out(loss, student, labels, teacher, hidden, teacher_hidden)
    assert set(parts) == set(expected)
    for name, part in parts.items():
        torch.testing.assert_close(part, expected[name].detach())
    weighted = 0.7 * (expected["kl"] + 0.3 * expected["cosine"] + 0.2 * expected["mse"]) + 0.4 * expected["hard"]
    torch.testing.assert_close(total, weighted)
    wanted = [student, hidden, *loss.parameters()]
    for actual, reference in zip(
        torch.autograd.grad(total, wanted), torch.autograd.grad(weighted, wanted), strict=True
    ):
        torch.testing.assert_close(actual, reference)


def test_gradients_match_finite_differences() -> None:
    loss = DistillationLoss(cosine=0.1, mse=0.1, student_dim=3, teacher_dim=3)
    labels, teacher, teacher_hidden = torch.tensor([1, -100, 2]), randn(1, 3, 4), randn(2, 3, 3)
    call = lambda student, hidden: loss(student, labels, teacher, hidden, teacher_hidden)[0]  # noqa: E731
    assert torch.autograd.gradcheck(call, (randn(3, 3, 4).requires_grad_(), randn(4, 3, 3).requires_grad_()))


def test_a_student_equal_to_its_teacher_has_nothing_to_learn_from_it() -> None:
    logits, hidden, labels = randn(0, 2, 3, 5), randn(1, 2, 3, 4), torch.zeros(2, 3, dtype=torch.long)
    loss = DistillationLoss(beta=0.0, cosine=0.1, mse=0.1, student_dim=4, teacher_dim=4)
    total, parts = loss(logits, labels, logits, hidden, hidden)
    assert abs(total.item()) < 1e-12
    assert set(parts) == {"kl", "mse", "cosine"}


def test_temperature_keeps_the_size_of_the_gradient() -> None:
    labels, teacher = torch.zeros(1, 1, dtype=torch.long), 0.01 * randn(0, 1, 1, 9)
    norms = []
    for temperature in (1.0, 10.0):
        student = 0.01 * randn(1, 1, 1, 9)
        student.requires_grad_()
        DistillationLoss(temperature=temperature, beta=0.0)(student, labels, teacher)[0].backward()
        norms.append(student.grad.norm().item())
    assert norms[1] == pytest.approx(norms[0], rel=0.02)


def test_sums_are_divided_by_the_items_given() -> None:
    student, teacher, labels = randn(0, 2, 3, 5), randn(1, 2, 3, 5), torch.ones(2, 3, dtype=torch.long)
    loss = DistillationLoss()
    torch.testing.assert_close(loss(student, labels, teacher, num_items=12)[0], loss(student, labels, teacher)[0] / 2)


def test_a_part_turned_off_needs_no_input() -> None:
    logits, labels = randn(0, 2, 3, 5), torch.ones(2, 3, dtype=torch.long)
    total, parts = DistillationLoss(alpha=0.0, beta=1.0)(logits, labels)
    assert set(parts) == {"hard"}
    torch.testing.assert_close(total, torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()))


def test_a_loss_whose_teacher_parts_are_all_off_needs_no_teacher() -> None:
    loss = DistillationLoss(kl=0.0)
    assert not loss.needs_teacher
    assert set(loss(randn(0, 2, 3, 5), torch.ones(2, 3, dtype=torch.long))[1]) == {"hard"}


def test_a_batch_without_labels_costs_nothing() -> None:
    logits = randn(0, 1, 2, 5).requires_grad_()
    total, _ = DistillationLoss()(logits, torch.full((1, 2), -100), randn(1, 1, 2, 5))
    total.backward()
    assert total.item() == 0
    assert logits.grad.abs().max() == 0


def test_hidden_states_can_be_aligned_without_the_divergence() -> None:
    hidden, labels = randn(1, 2, 3, 4), torch.ones(2, 3, dtype=torch.long)
    loss = DistillationLoss(kl=0.0, beta=0.0, cosine=1.0, student_dim=4, teacher_dim=4)
    total, parts = loss(randn(0, 2, 3, 5), labels, randn(2, 2, 3, 5), hidden, -hidden)
    assert set(parts) == {"cosine"}
    assert total.item() == pytest.approx(0.8 * 2)


def test_half_precision_logits_are_compared_in_float32() -> None:
    student, teacher, labels = randn(0, 4, 500), randn(1, 4, 500), torch.zeros(4, dtype=torch.long)
    half = [t.to(torch.bfloat16) for t in (student, teacher)]
    exact = DistillationLoss()(half[0].double(), labels, half[1].double())[0]
    ours = DistillationLoss()(half[0], labels, half[1])[0]
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=0)


def test_presets_are_those_of_the_specification() -> None:
    cvm, ntmm = DistillationLoss.cvm(), DistillationLoss.ntmm(4, 6)
    assert (cvm.temperature, cvm.alpha, cvm.beta, cvm.cosine, cvm.mse) == (6.0, 0.8, 0.2, 0.0, 0.0)
    assert (ntmm.temperature, ntmm.alpha, ntmm.beta, ntmm.cosine, ntmm.mse) == (3.0, 0.5, 0.5, 0.1, 0.05)
    assert DistillationLoss.cvm(temperature=2.0).temperature == 2.0


LOGITS, LABELS = torch.zeros(1, 2, 5), torch.zeros(1, 2, dtype=torch.long)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: DistillationLoss(temperature=0.0), "temperature=0.0 must be positive and finite"),
        (lambda: DistillationLoss(alpha=-1.0), "alpha=-1.0 must be finite and not negative"),
        (lambda: DistillationLoss(alpha=float("nan")), "alpha=nan must be finite"),
        (lambda: DistillationLoss(label_smoothing=1.0), r"label_smoothing=1.0 must lie in \[0, 1\)"),
        (lambda: DistillationLoss(temperature=float("inf")), "temperature=inf must be positive and finite"),
        (lambda: DistillationLoss(alpha=0.0, beta=0.0), "every part of the loss is turned off"),
        (lambda: DistillationLoss(kl=0.0, beta=0.0), "every part of the loss is turned off"),
        (lambda: DistillationLoss(cosine=0.1), "cosine=0.1 needs student_dim and teacher_dim"),
        (lambda: DistillationLoss()(LOGITS, LABELS), "alpha=0.8 needs teacher_logits"),
        (lambda: DistillationLoss()(LOGITS, LABELS, torch.zeros(1, 2, 6)), r"\(1, 2, 6\).*share one vocabulary"),
        (lambda: DistillationLoss()(LOGITS, LABELS[:, :1], LOGITS), r"labels have shape \(1, 1\)"),
        (
            lambda: DistillationLoss(cosine=0.1, student_dim=3, teacher_dim=3)(LOGITS, LABELS, LOGITS),
            "cosine=0.1 needs student_hidden",
        ),
    ],
)
def test_bad_arguments_are_named(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()
