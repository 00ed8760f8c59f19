"""Logits, or hidden states with the head: both routes of the loss give the same."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from neural_layers.distill.losses import DistillationLoss, Outputs, TopK
from neural_layers.distill.losses.chunked import chunked_sum

quiet = settings(derandomize=True, deadline=None, database=None, max_examples=30)
DIVERGENCES = ["forward", "reverse", "jsd"]


def randn(seed: int, *shape: int, dtype=torch.float64) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def both_routes(loss, hidden, head, labels, teacher_hidden, teacher_head, num_items=None):
    """(loss, parts, gradients of hidden and head) of each route; logits are made of zeros where no label counts."""
    counted = (labels != -100).unsqueeze(-1)

    def chunked(h, w):
        return Outputs(hidden=h, head=w)

    def plain(h, w):
        return Outputs(logits=torch.where(counted, h, 0) @ w.T)

    results = []
    for route in (chunked, plain):
        tensors = [hidden.clone().requires_grad_(), head.clone().requires_grad_()]
        total, parts = loss(route(*tensors), labels, route(teacher_hidden, teacher_head), num_items)
        results.append([total, *parts.values(), *torch.autograd.grad(total, tensors)])
    return results


@quiet
@given(
    shape=st.tuples(st.integers(1, 3), st.integers(1, 5)),
    sizes=st.tuples(st.integers(1, 6), st.integers(1, 6), st.integers(2, 40)),
    divergence=st.sampled_from(DIVERGENCES),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    ignored=st.floats(0, 1),
    seed=st.integers(0, 999),
)
def test_both_routes_agree_in_values_and_gradients(shape, sizes, divergence, dtype, ignored, seed) -> None:
    width, teacher_width, vocabulary = sizes
    labels = torch.randint(0, vocabulary, shape, generator=torch.Generator().manual_seed(seed))
    labels[torch.rand(shape, generator=torch.Generator().manual_seed(seed + 1)) < ignored] = -100
    hidden, head = randn(seed, *shape, width, dtype=dtype), randn(seed + 1, vocabulary, width, dtype=dtype)
    hidden[labels == -100] = torch.nan  # padding may hold anything
    teacher = [randn(seed + 2, *shape, teacher_width, dtype=dtype)]
    teacher += [randn(seed + 3, vocabulary, teacher_width, dtype=dtype)]
    loss = DistillationLoss(temperature=2.0, mse=0.3, label_smoothing=0.1, divergence=divergence)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-10
    for chunked, plain in zip(*both_routes(loss, hidden, head, labels, *teacher, num_items=7), strict=True):
        torch.testing.assert_close(chunked, plain, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_a_batch_without_labels_costs_nothing(divergence) -> None:
    loss = DistillationLoss(mse=0.3, divergence=divergence)
    labels = torch.full((2, 3), -100)
    for results in both_routes(loss, randn(0, 2, 3, 4), randn(1, 9, 4), labels, randn(2, 2, 3, 4), randn(3, 9, 4)):
        assert all(value.abs().max() == 0 for value in results)


@pytest.mark.parametrize("divergence", DIVERGENCES)
def test_many_rows_are_taken_in_chunks_and_never_all_at_once(divergence) -> None:
    class Largest(TorchDispatchMode):
        size = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
            self.size = max([self.size, *(tensor.numel() for tensor in made)])
            return result

    rows, vocabulary = 1024, 500
    hidden, head = randn(0, rows, 4).requires_grad_(), randn(1, vocabulary, 4).requires_grad_()
    teacher = Outputs(hidden=randn(2, rows, 4), head=randn(3, vocabulary, 4))
    loss = DistillationLoss(mse=0.3, divergence=divergence)
    with Largest() as largest:
        loss(Outputs(hidden=hidden, head=head), torch.arange(rows) % vocabulary, teacher)[0].backward()
    assert largest.size < rows * vocabulary / 2
    with Largest() as largest:  # the detector finds what it is there for
        loss(Outputs(logits=hidden @ head.T), torch.arange(rows) % vocabulary, teacher)[0].backward()
    assert largest.size >= rows * vocabulary


def test_a_graph_that_is_retained_gives_the_same_gradients_again() -> None:
    hidden, head = randn(0, 3, 4).requires_grad_(), randn(1, 9, 4).requires_grad_()
    total = 3 * chunked_sum(lambda z, others, rows: z.square().sum(-1), hidden, head, scale=0.5)
    first = [g.clone() for g in torch.autograd.grad(total, (hidden, head), retain_graph=True)]
    second = torch.autograd.grad(total, (hidden, head))
    plain = torch.autograd.grad(3 * (0.5 * hidden @ head.T).square().sum(), (hidden, head))
    for a, b, c in zip(first, second, plain, strict=True):
        torch.testing.assert_close(a, c)
        torch.testing.assert_close(b, c)


def test_half_precision_hidden_states_are_compared_in_float32() -> None:
    hidden, head = randn(0, 4, 8, dtype=torch.bfloat16), randn(1, 300, 8, dtype=torch.bfloat16)
    teacher = randn(2, 4, 8, dtype=torch.bfloat16), randn(3, 300, 8, dtype=torch.bfloat16)
    for divergence in DIVERGENCES:
        loss = DistillationLoss(divergence=divergence)
        labels = torch.arange(4)
        ours = loss(Outputs(hidden=hidden, head=head), labels, Outputs(hidden=teacher[0], head=teacher[1]))[0]
        wide = [tensor.double() for tensor in (hidden, head, *teacher)]
        exact = loss(Outputs(hidden=wide[0], head=wide[1]), labels, Outputs(hidden=wide[2], head=wide[3]))[0]
        assert ours.dtype == torch.float32
        torch.testing.assert_close(ours.double(), exact, rtol=1e-5, atol=0)


def test_mixed_routes_agree_too() -> None:
    hidden, head, teacher = randn(0, 3, 4), randn(1, 9, 4), randn(2, 3, 9)
    loss, labels = DistillationLoss(mse=0.2), torch.tensor([1, 2, -100])
    mixed = loss(Outputs(hidden=hidden, head=head), labels, Outputs(logits=teacher))[0]
    torch.testing.assert_close(mixed, loss(Outputs(logits=hidden @ head.T), labels, Outputs(logits=teacher))[0])


def test_class_weights_with_a_head_are_refused() -> None:
    loss = DistillationLoss(alpha=0.0, class_weights=torch.ones(9))
    with pytest.raises(ValueError, match="class_weights are for classifiers"):
        loss(Outputs(hidden=randn(0, 3, 4), head=randn(1, 9, 4)), torch.tensor([1, 2, 3]))


# The cache's divergence


def top_k(teacher: torch.Tensor, k: int, temperature: float) -> TopK:
    """As a cache would give it, in float64."""
    logits, indices = teacher.topk(k, dim=-1)
    log_p = (teacher / temperature).log_softmax(-1).scatter(-1, indices, -torch.inf)
    return TopK(indices, logits, log_p.logsumexp(-1), temperature, teacher.shape[-1])


def plain_coarse_kl(student: torch.Tensor, teacher: torch.Tensor, k: int, temperature: float) -> torch.Tensor:
    total = 0.0
    for s, t in zip(student, teacher, strict=True):
        p, q = (t / temperature).softmax(-1), (s / temperature).softmax(-1)
        inside = sorted(range(len(t)), key=lambda v: -t[v].item())[:k]
        outside = [v for v in range(len(t)) if v not in inside]
        total = total + sum(p[v] * (p[v].log() - q[v].log()) for v in inside)
        if outside:
            r, rest = p[outside].sum(), q[outside].sum()
            total = total + r * (r.log() - rest.log())
    return temperature**2 * total / len(student)


@quiet
@given(k=st.integers(1, 9), temperature=st.sampled_from([1.0, 3.0]), seed=st.integers(0, 99))
def test_cached_divergence_is_its_formula_on_both_routes(k, temperature, seed) -> None:
    hidden, head, teacher = randn(seed, 3, 4), randn(seed + 1, 9, 4), 3 * randn(seed + 2, 3, 9)
    loss, labels = DistillationLoss(temperature=temperature, alpha=1.0, beta=0.0), torch.zeros(3, dtype=torch.long)
    tensors = [hidden.requires_grad_(), head.requires_grad_()]
    cached = Outputs(cached=top_k(teacher, k, temperature))
    expected = plain_coarse_kl(hidden @ head.T, teacher, k, temperature)
    for student in (Outputs(hidden=hidden, head=head), Outputs(logits=hidden @ head.T)):
        total = loss(student, labels, cached)[0]
        torch.testing.assert_close(total, expected)
        found = zip(
            torch.autograd.grad(total, tensors), torch.autograd.grad(expected, tensors, retain_graph=True), strict=True
        )
        for ours, reference in found:
            torch.testing.assert_close(ours, reference)


@quiet
@given(
    k=st.integers(1, 20),
    scale=st.floats(0.1, 20),
    divergence=st.sampled_from(DIVERGENCES),
    temperature=st.sampled_from([1.0, 6.0]),
    seed=st.integers(0, 999),
)
def test_cached_divergence_is_a_lower_bound_and_exact_with_all_entries(k, scale, divergence, temperature, seed) -> None:
    student, teacher = scale * randn(seed, 4, 20), scale * randn(seed + 1, 4, 20)
    loss = DistillationLoss(temperature=temperature, alpha=1.0, beta=0.0, divergence=divergence)
    labels = torch.zeros(4, dtype=torch.long)
    cached, exact = (
        loss(Outputs(logits=student), labels, other)[0].item()
        for other in (Outputs(cached=top_k(teacher, k, temperature)), Outputs(logits=teacher))
    )
    assert -1e-12 <= cached <= exact * (1 + 1e-12) + 1e-12
    if k == 20:
        assert cached == pytest.approx(exact, rel=1e-12, abs=1e-12)


def test_a_student_that_is_sure_keeps_the_digits_of_the_rest() -> None:
    student = torch.zeros(1, 6)
    student[0, 0] = 60.0  # 1 − q rounds to 0 in float32
    student.requires_grad_()
    teacher = TopK(torch.tensor([[0, 1]]), torch.tensor([[0.0, -1.0]]), torch.tensor([-2.0]), 1.0, 6)
    loss = DistillationLoss(temperature=1.0, alpha=1.0, beta=0.0)
    total = loss(Outputs(logits=student), torch.tensor([0]), Outputs(cached=teacher))[0]
    wide = loss(Outputs(logits=student.double()), torch.tensor([0]), Outputs(cached=teacher))[0]
    total.backward()
    assert total.item() == pytest.approx(wide.item(), rel=1e-5)
    assert student.grad.isfinite().all()


TOP = top_k(randn(0, 2, 9), 3, 6.0)


@pytest.mark.parametrize(
    ("loss", "cached", "labels", "message"),
    [
        ({"mse": 0.1}, TOP, [0, 1], "neither hidden states nor all logits, which mse=0.1 would compare"),
        ({"temperature": 3.0}, TOP, [0, 1], "temperature=3.0, and the teacher cache was built for 6.0"),
        ({}, TOP, [0, -100], "has 2 rows for this batch, whose labels have 1 that count"),
        ({}, top_k(randn(0, 2, 8), 3, 6.0), [0, 1], "vocabulary has 8 entries and the student's 9"),
    ],
)
def test_what_a_cache_cannot_give_is_refused(loss, cached, labels, message) -> None:
    with pytest.raises(ValueError, match=message):
        DistillationLoss(**loss)(Outputs(logits=randn(1, 2, 9)), torch.tensor(labels), Outputs(cached=cached))
