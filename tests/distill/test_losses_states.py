"""Hidden states of a student drawn to those of its teacher, and schedules."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from neural_layers.distill.losses import DistillationLoss, Outputs, Schedule, StateAlignment
from neural_layers.distill.losses.states import layer_pairs

quiet = settings(derandomize=True, deadline=None, database=None, max_examples=25)


def randn(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def written_out(alignment, student, teacher, mask) -> torch.Tensor:
    """The distance of each example in plain loops."""
    distances = []
    for b in range(len(mask)):
        tokens, total = [t for t in range(mask.shape[1]) if mask[b, t]], 0.0
        for (i, j), projection in zip(alignment.pairs, alignment.projections, strict=True):
            ours, theirs = [student[i][b, t] for t in tokens], [teacher[j][b, t] for t in tokens]
            if alignment.of == "mean":
                ours, theirs = [sum(ours) / len(tokens)], [sum(theirs) / len(tokens)]
            ours = [projection(x) for x in ours]
            cosines = [x @ y / x.norm() / y.norm() for x, y in zip(ours, theirs, strict=True)]
            total = total + sum(1 - cosine for cosine in cosines) / len(cosines)
        distances.append(total / len(alignment.pairs))
    return torch.stack(distances)


@quiet
@given(
    layers=st.sampled_from(["last", "uniform", [(0, 0), (2, -2)]]),
    of=st.sampled_from(["token", "mean"]),
    teacher_dim=st.sampled_from([3, 5]),
    lengths=st.lists(st.integers(1, 4), min_size=1, max_size=3),
    seed=st.integers(0, 99),
)
def test_distances_are_their_formula_whatever_padding_holds(layers, of, teacher_dim, lengths, seed) -> None:
    torch.manual_seed(seed)
    alignment = StateAlignment(
        layers, of=of, student_dim=3, teacher_dim=teacher_dim, num_student_layers=2, num_teacher_layers=4
    ).double()
    batch = len(lengths)
    mask = torch.arange(4) < torch.tensor(lengths).unsqueeze(1)
    student = [randn(seed + n, batch, 4, 3).masked_fill(~mask.unsqueeze(-1), math.nan) for n in range(3)]
    teacher = [randn(seed + 9 + n, batch, 4, teacher_dim).masked_fill(~mask.unsqueeze(-1), math.nan) for n in range(5)]
    student = [state.requires_grad_() for state in student]
    ours = Outputs(states=tuple(student), mask=mask)
    distances = alignment(ours, Outputs(states=tuple(teacher), mask=mask))
    expected = written_out(alignment, student, teacher, mask)
    torch.testing.assert_close(distances, expected)
    wanted = [*(student[i] for i, _ in alignment.pairs), *alignment.parameters()]
    for ours, reference in zip(
        torch.autograd.grad(distances.sum(), wanted), torch.autograd.grad(expected.sum(), wanted), strict=True
    ):
        # The plain loops touch no padding, and autograd gives it zeros.
        torch.testing.assert_close(ours, reference)
        assert ours.isfinite().all()


def test_uniform_layers_end_at_the_last_of_both() -> None:
    assert layer_pairs("uniform", 2, 5) == [(1, 3), (2, 5)]
    assert layer_pairs("uniform", 6, 12) == [(i, 2 * i) for i in range(1, 7)]
    assert layer_pairs("uniform", 3, 3) == [(1, 1), (2, 2), (3, 3)]
    assert layer_pairs("uniform", 4, 2) == [(1, 1), (2, 1), (3, 2), (4, 2)]


def test_widths_that_are_equal_need_no_projection_and_others_one_for_each_pair() -> None:
    assert not list(StateAlignment(student_dim=3, teacher_dim=3).parameters())
    projected = StateAlignment([(1, 1), (2, 4)], student_dim=3, teacher_dim=5)
    assert [p.shape for p in projected.parameters()] == [(5, 3), (5, 3)]


def test_an_example_weighs_as_its_labels_do() -> None:
    states, other = randn(0, 3, 4, 5), randn(1, 3, 4, 5)
    alignment = StateAlignment(student_dim=5, teacher_dim=5, of="mean")
    distances = alignment(Outputs(states=(states,)), Outputs(states=(other,)))
    loss = DistillationLoss(alpha=1.0, beta=0.0, kl=0.0, cosine=1.0, states=alignment)
    of_examples, of_tokens = torch.tensor([0, -100, 2]), torch.full((3, 4), -100)
    of_tokens[0, :3] = 1
    of_tokens[2, :1] = 1
    run = lambda labels: loss(Outputs(states=(states,)), labels, Outputs(states=(other,)))[0]  # noqa: E731
    torch.testing.assert_close(run(of_examples), (distances[0] + distances[2]) / 2)
    torch.testing.assert_close(run(of_tokens), (3 * distances[0] + distances[2]) / 4)


def test_an_example_without_tokens_costs_nothing() -> None:
    states = randn(0, 2, 3, 4).requires_grad_()
    mask = torch.tensor([[True, True, False], [False, False, False]])
    for of in ("token", "mean"):
        alignment = StateAlignment(student_dim=4, teacher_dim=4, of=of)
        distances = alignment(Outputs(states=(states,), mask=mask), Outputs(states=(randn(1, 2, 3, 4),), mask=mask))
        assert distances[1] == 0
        (gradient,) = torch.autograd.grad(distances.sum(), states)
        assert gradient.isfinite().all()
        assert gradient[1].abs().max() == 0


def test_means_compare_texts_of_unlike_length() -> None:
    """A teacher and a student with tokenizers of their own."""
    alignment = StateAlignment(student_dim=4, teacher_dim=4, of="mean")
    student, teacher = Outputs(states=(randn(0, 2, 3, 4),)), Outputs(states=(randn(1, 2, 6, 4),))
    assert alignment(student, teacher).shape == (2,)
    with pytest.raises(ValueError, match="must read the same tokens"):
        StateAlignment(student_dim=4, teacher_dim=4, of="token")(student, teacher)


def test_a_projection_is_left_out_where_the_cosine_is_off() -> None:
    states = StateAlignment(student_dim=3, teacher_dim=5)
    assert list(DistillationLoss(cosine=0.1, states=states).parameters())
    assert not list(DistillationLoss(cosine=0.0, states=states).parameters())


STATES = Outputs(states=(torch.zeros(2, 3, 4),) * 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: StateAlignment("first", student_dim=3, teacher_dim=3), "layers='first' must be 'last', 'uniform' or"),
        (lambda: StateAlignment([], student_dim=3, teacher_dim=3), r"layers=\[\] must be"),
        (lambda: StateAlignment("uniform", student_dim=3, teacher_dim=3), "needs num_student_layers"),
        (lambda: StateAlignment(student_dim=3, teacher_dim=3, of="max"), "of='max' must be 'token' or 'mean'"),
        (lambda: StateAlignment(student_dim=0, teacher_dim=3), "student_dim=0 and teacher_dim=3 must be at least 1"),
        (
            lambda: StateAlignment([(1, 7)], student_dim=3, teacher_dim=3, num_teacher_layers=6),
            "layer 7 of the teacher, which has 0 … 6",
        ),
        (
            lambda: StateAlignment([(3, 1)], student_dim=4, teacher_dim=4)(STATES, STATES),
            "layer 3 of the student, whose states end at 2",
        ),
        (
            lambda: StateAlignment(student_dim=3, teacher_dim=4)(STATES, STATES),
            "widths 4 and 4; expected student_dim=3",
        ),
        (
            lambda: StateAlignment(student_dim=4, teacher_dim=4)(
                STATES, Outputs(states=STATES.states, mask=torch.ones(2, 3))
            ),
            "mask has shape .* torch.float32; expected .* torch.bool",
        ),
    ],
)
def test_bad_alignments_are_named(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()


# Schedules


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("0.9", (0.9, 0.9, 0.9, 0.9)),
        (2, (2.0, 2.0, 2.0, 2.0)),
        ("0.9:0.5", (0.9, 0.8, 0.7, 0.5)),
        ("1:3:linear", (1.0, 1.5, 2.0, 3.0)),
        ("0.9:0.5:cosine", (0.9, 0.7 + 0.2 * math.cos(math.pi / 4), 0.7, 0.5)),
    ],
)
def test_a_schedule_goes_from_its_start_to_its_end(text, values) -> None:
    schedule = Schedule.parse(text)
    assert [schedule.at(p) for p in (0, 0.25, 0.5, 1)] == pytest.approx(values, rel=1e-12)
    assert Schedule.parse(str(schedule)) == schedule


@pytest.mark.parametrize("text", ["", "a", "1:", "1:2:3", "1:2:cosine:4", "1:2:step"])
def test_a_text_that_is_no_schedule_is_named(text) -> None:
    with pytest.raises(ValueError, match="is no schedule|there is no schedule"):
        Schedule.parse(text)


def test_a_loss_follows_its_progress() -> None:
    loss = DistillationLoss(temperature="4:2", alpha="0.9:0.5", beta="0:1:cosine")
    student, teacher, labels = Outputs(logits=randn(0, 3, 5)), Outputs(logits=randn(1, 3, 5)), torch.tensor([0, 1, 2])
    seen = []
    for progress in (0.0, 0.5, 1.0):
        loss.progress = progress
        total, parts = loss(student, labels, teacher)
        fixed = DistillationLoss(temperature=loss.temperature, alpha=loss.alpha, beta=loss.beta)
        torch.testing.assert_close(total, fixed(student, labels, teacher)[0])
        seen.append((loss.temperature, loss.alpha, loss.beta, "hard" in parts))
    assert [has_hard for *_, has_hard in seen] == [False, True, True]
    numbers = [number for *found, _ in seen for number in found]
    assert numbers == pytest.approx([4.0, 0.9, 0.0, 3.0, 0.7, 0.5, 2.0, 0.5, 1.0], rel=1e-12)


def test_a_teacher_is_needed_where_alpha_is_zero_only_at_first() -> None:
    assert DistillationLoss(alpha="0:0.5", beta=1.0).needs_teacher
    assert not DistillationLoss(alpha=0.0, beta=1.0).needs_teacher


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: DistillationLoss(temperature="4:0"), "temperature=0.0 must be positive"),
        (lambda: DistillationLoss(alpha="0.5:-0.5"), "alpha=-0.5 must be finite and not negative"),
        (lambda: DistillationLoss(alpha="0.5:nan"), "from 0.5 to nan; both must be finite"),
        (lambda: DistillationLoss(alpha="1:0", beta=0.0), "turned off .at progress 1"),
        (lambda: setattr(DistillationLoss(), "progress", 1.5), r"progress=1.5 must lie in \[0, 1\]"),
    ],
)
def test_both_ends_of_a_schedule_are_checked(build, message) -> None:
    with pytest.raises(ValueError, match=message):
        build()


def test_a_schedule_that_stays_is_its_number_to_the_last_bit() -> None:
    """A teacher cache is of one temperature, which the loss compares with its own at every step."""
    for value in (1.5, 3.0, 5.0, 6.0, 7.0):
        schedule = Schedule.parse(str(value))
        assert {schedule.at(step / 997) for step in range(997)} == {value}
