"""DistillationLoss against its formula, written out row by row."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from neural_layers.distill.losses import DistillationLoss, Outputs, StateAlignment

quiet = settings(derandomize=True, deadline=None, database=None, max_examples=25)


def randn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def logits(tensor: torch.Tensor) -> Outputs:
    return Outputs(logits=tensor)


def plain_divergence(kind: str, p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    kl = lambda a, b: sum(a[v] * (a[v] / b[v]).log() for v in range(len(a)))  # noqa: E731
    if kind == "jsd":
        m = (p + q) / 2
        return kl(p, m) / 2 + kl(q, m) / 2
    return kl(p, q) if kind == "forward" else kl(q, p)


def written_out(loss, student, labels, teacher, student_states, teacher_states) -> dict[str, torch.Tensor]:
    """Each part as a mean over the counted tokens, in plain loops."""
    parts, count = {"kl": 0.0, "hard": 0.0, "mse": 0.0, "cosine": 0.0}, 0
    temperature, smoothing = loss.temperature, loss.label_smoothing
    for b in range(labels.shape[0]):
        for t in range(labels.shape[1]):
            if labels[b, t] == -100:
                continue
            count += 1
            p, q = (teacher[b, t] / temperature).softmax(-1), (student[b, t] / temperature).softmax(-1)
            parts["kl"] += temperature**2 * plain_divergence(loss.divergence, p, q)
            log_q = student[b, t].log_softmax(-1)
            parts["hard"] -= (1 - smoothing) * log_q[labels[b, t]] + smoothing * log_q.mean()
            parts["mse"] += ((student[b, t] - teacher[b, t]) ** 2).mean()
            projected, target = loss.states.projections[0](student_states[b, t]), teacher_states[b, t]
            parts["cosine"] += 1 - projected @ target / projected.norm() / target.norm()
    return {name: part / max(count, 1) for name, part in parts.items()}


@quiet
@given(
    temperature=st.sampled_from([1.0, 2.5, 6.0]),
    smoothing=st.sampled_from([0.0, 0.1]),
    divergence=st.sampled_from(["forward", "reverse", "jsd"]),
    teacher_dim=st.sampled_from([4, 6]),
    seed=st.integers(0, 99),
)
def test_loss_is_its_formula_in_value_and_gradient(temperature, smoothing, divergence, teacher_dim, seed) -> None:
    torch.manual_seed(seed)
    loss = DistillationLoss(
        temperature=temperature,
        alpha=0.7,
        beta=0.4,
        cosine=0.3,
        mse=0.2,
        label_smoothing=smoothing,
        divergence=divergence,
        states=StateAlignment(student_dim=4, teacher_dim=teacher_dim),
    ).double()
    student, teacher = randn(seed, 2, 5, 7).requires_grad_(), randn(seed + 1, 2, 5, 7)
    states = randn(seed + 2, 2, 5, 4).requires_grad_()
    teacher_states = randn(seed + 3, 2, 5, teacher_dim)
    labels = torch.randint(0, 7, (2, 5), generator=torch.Generator().manual_seed(seed))
    labels[0, 3:] = -100
    mask = labels != -100

    ours = Outputs(logits=student, states=(states,), mask=mask)
    total, parts = loss(ours, labels, Outputs(logits=teacher, states=(teacher_states,), mask=mask))
    expected = written_out(loss, student, labels, teacher, states, teacher_states)
    assert set(parts) == set(expected)
    for name, part in parts.items():
        torch.testing.assert_close(part, expected[name].detach())
    weighted = 0.7 * (expected["kl"] + 0.3 * expected["cosine"] + 0.2 * expected["mse"]) + 0.4 * expected["hard"]
    torch.testing.assert_close(total, weighted)
    wanted = [student, states, *loss.parameters()]
    for actual, reference in zip(
        torch.autograd.grad(total, wanted), torch.autograd.grad(weighted, wanted), strict=True
    ):
        torch.testing.assert_close(actual, reference)


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
def test_gradients_match_finite_differences(divergence) -> None:
    loss = DistillationLoss(
        cosine=0.1, mse=0.1, divergence=divergence, states=StateAlignment(student_dim=3, teacher_dim=3)
    )
    labels, teacher = torch.tensor([1, -100, 2]), Outputs(logits=randn(1, 3, 4), states=(randn(2, 3, 1, 3),))
    call = lambda student, states: loss(Outputs(logits=student, states=(states,)), labels, teacher)[0]  # noqa: E731
    assert torch.autograd.gradcheck(call, (randn(3, 3, 4).requires_grad_(), randn(4, 3, 1, 3).requires_grad_()))


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
def test_a_student_equal_to_its_teacher_has_nothing_to_learn_from_it(divergence) -> None:
    labels = torch.zeros(2, 3, dtype=torch.long)
    same = Outputs(logits=randn(0, 2, 3, 5), states=(randn(1, 2, 3, 4),))
    states = StateAlignment(student_dim=4, teacher_dim=4)
    loss = DistillationLoss(beta=0.0, cosine=0.1, mse=0.1, states=states, divergence=divergence)
    total, parts = loss(same, labels, same)
    assert abs(total.item()) < 1e-12
    assert set(parts) == {"kl", "mse", "cosine"}


def divergence_of(kind: str, student: torch.Tensor, teacher: torch.Tensor, temperature: float = 2.0) -> float:
    loss = DistillationLoss(temperature=temperature, beta=0.0, divergence=kind)
    return loss(logits(student), torch.zeros(len(student), dtype=torch.long), logits(teacher))[1]["kl"].item()


@quiet
@given(scale=st.floats(0.01, 300), temperature=st.sampled_from([0.5, 2.0, 6.0]), seed=st.integers(0, 99))
def test_jensen_shannon_is_symmetric_and_bounded_by_log_2(scale, temperature, seed) -> None:
    student, teacher = scale * randn(seed, 3, 6), scale * randn(seed + 100, 3, 6)
    value = divergence_of("jsd", student, teacher, temperature)
    assert value == pytest.approx(divergence_of("jsd", teacher, student, temperature), rel=1e-9)
    assert -1e-12 <= value <= math.log(2) * temperature**2 * (1 + 1e-12)


def test_reverse_is_forward_of_the_two_exchanged_and_they_differ() -> None:
    student, teacher = randn(0, 3, 6), randn(1, 3, 6)
    forward, reverse = (divergence_of(kind, student, teacher) for kind in ("forward", "reverse"))
    assert reverse == pytest.approx(divergence_of("forward", teacher, student), rel=1e-12)
    assert abs(reverse - forward) > 1e-3


@pytest.mark.parametrize("divergence", ["forward", "reverse", "jsd"])
def test_temperature_keeps_the_size_of_the_gradient(divergence) -> None:
    labels, teacher = torch.zeros(1, 1, dtype=torch.long), logits(0.01 * randn(0, 1, 1, 9))
    norms = []
    for temperature in (1.0, 10.0):
        student = 0.01 * randn(1, 1, 1, 9)
        student.requires_grad_()
        loss = DistillationLoss(temperature=temperature, beta=0.0, divergence=divergence)
        loss(logits(student), labels, teacher)[0].backward()
        norms.append(student.grad.norm().item())
    assert norms[1] == pytest.approx(norms[0], rel=0.02)


def test_sums_are_divided_by_the_items_given() -> None:
    student, teacher, labels = logits(randn(0, 2, 3, 5)), logits(randn(1, 2, 3, 5)), torch.ones(2, 3, dtype=torch.long)
    loss = DistillationLoss()
    torch.testing.assert_close(loss(student, labels, teacher, num_items=12)[0], loss(student, labels, teacher)[0] / 2)


def test_a_part_turned_off_needs_no_input() -> None:
    student, labels = randn(0, 2, 3, 5), torch.ones(2, 3, dtype=torch.long)
    total, parts = DistillationLoss(alpha=0.0, beta=1.0)(logits(student), labels)
    assert set(parts) == {"hard"}
    torch.testing.assert_close(total, torch.nn.functional.cross_entropy(student.flatten(0, 1), labels.flatten()))


def test_a_loss_whose_teacher_parts_are_all_off_needs_no_teacher() -> None:
    loss = DistillationLoss(kl=0.0)
    assert not loss.needs_teacher
    assert set(loss(logits(randn(0, 2, 3, 5)), torch.ones(2, 3, dtype=torch.long))[1]) == {"hard"}


def test_a_batch_without_labels_costs_nothing() -> None:
    student = randn(0, 1, 2, 5).requires_grad_()
    total, _ = DistillationLoss()(logits(student), torch.full((1, 2), -100), logits(randn(1, 1, 2, 5)))
    total.backward()
    assert total.item() == 0
    assert student.grad.abs().max() == 0


def test_hidden_states_can_be_aligned_without_logits() -> None:
    states, labels = randn(1, 2, 3, 4), torch.ones(2, 3, dtype=torch.long)
    loss = DistillationLoss(kl=0.0, beta=0.0, cosine=1.0, states=StateAlignment(student_dim=4, teacher_dim=4))
    total, parts = loss(Outputs(states=(states,)), labels, Outputs(states=(-states,)))
    assert set(parts) == {"cosine"}
    assert total.item() == pytest.approx(0.8 * 2)


def test_half_precision_logits_are_compared_in_float32() -> None:
    student, teacher, labels = randn(0, 4, 500), randn(1, 4, 500), torch.zeros(4, dtype=torch.long)
    half = [t.to(torch.bfloat16) for t in (student, teacher)]
    exact = DistillationLoss()(logits(half[0].double()), labels, logits(half[1].double()))[0]
    ours = DistillationLoss()(logits(half[0]), labels, logits(half[1]))[0]
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=0)


def test_the_teacher_gets_no_gradient() -> None:
    student, teacher = randn(0, 2, 5).requires_grad_(), randn(1, 2, 5).requires_grad_()
    DistillationLoss()(logits(student), torch.ones(2, dtype=torch.long), logits(teacher))[0].backward()
    assert teacher.grad is None


def test_class_weights_are_those_of_torch() -> None:
    student, labels, weights = randn(0, 6, 3), torch.tensor([0, 1, 2, 2, -100, 1]), torch.tensor([0.5, 1.0, 3.0])
    loss = DistillationLoss(alpha=0.0, beta=1.0, label_smoothing=0.1, class_weights=weights)
    judge = torch.nn.functional.cross_entropy(student, labels, weights.double(), reduction="sum", label_smoothing=0.1)
    torch.testing.assert_close(loss(logits(student), labels)[0], judge / 5)
    assert not loss.state_dict()


def test_presets_are_those_of_the_specification() -> None:
    cvm, ntmm = DistillationLoss.cvm(), DistillationLoss.ntmm(4, 6)
    assert (cvm.temperature, cvm.alpha, cvm.beta, cvm.cosine, cvm.mse) == (6.0, 0.8, 0.2, 0.0, 0.0)
    assert (ntmm.temperature, ntmm.alpha, ntmm.beta, ntmm.cosine, ntmm.mse) == (3.0, 0.5, 0.5, 0.1, 0.05)
    assert ntmm.label_smoothing == 0.1
    assert ntmm.states.of == "mean"
    assert [p.shape for p in ntmm.parameters()] == [(6, 4)]
    assert DistillationLoss.cvm(temperature=2.0).temperature == 2.0
    assert not list(DistillationLoss.ntmm(4, 6, cosine=0.0, mse=0.0).parameters())


LOGITS, LABELS = logits(torch.zeros(1, 2, 5)), torch.zeros(1, 2, dtype=torch.long)


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
        (lambda: DistillationLoss(divergence="tv"), "divergence='tv' must be one of forward, reverse, jsd"),
        (lambda: DistillationLoss(cosine=0.1), "cosine=0.1 needs states="),
        (lambda: DistillationLoss(class_weights=torch.tensor([1.0, -1.0])), "finite number ≥ 0 for each class"),
        (lambda: DistillationLoss()(LOGITS, LABELS), "alpha=0.8 needs the teacher's outputs"),
        (lambda: DistillationLoss()(LOGITS, LABELS, logits(torch.zeros(1, 2, 6))), "has 6 entries and the student's 5"),
        (lambda: DistillationLoss()(LOGITS, LABELS[:, :1], LOGITS), r"labels have shape \(1, 1\)"),
        (lambda: DistillationLoss()(LOGITS, LABELS + 5, LOGITS), "labels hold 5; expected 0 ≤ label < 5"),
        (lambda: DistillationLoss()(Outputs(), LABELS, LOGITS), "no logits; give logits, or hidden and head"),
        (lambda: Outputs(hidden=torch.zeros(2, 3)), "hidden is given without head"),
        (lambda: Outputs(logits=torch.zeros(2, 3), hidden=torch.zeros(2, 3), head=torch.zeros(4, 3)), "give one of"),
        (
            lambda: DistillationLoss(cosine=0.1, states=StateAlignment(student_dim=3, teacher_dim=3))(
                LOGITS, LABELS, LOGITS
            ),
            "the student's outputs have no states",
        ),
    ],
)
def test_bad_arguments_are_named(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()
