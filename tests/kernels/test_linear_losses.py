"""linear_cross_entropy and linear_kl_div against their references and torch's losses of all the logits."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as tf
from hypothesis import given as draw
from hypothesis import strategies as st
from torch import Tensor

import neural_layers.functional as F
from neural_layers.kernels import c_library
from tests.op_checks import Arguments, assert_matches_reference, non_contiguous, relative_error, seeded
from tests.tolerances import FORWARD, GRADIENT

NATIVE = pytest.param(
    "native",
    marks=[
        pytest.mark.native,
        pytest.mark.skipif(not c_library.VARIANT, reason="the C kernels are not built on this machine"),
    ],
)
BACKENDS = [NATIVE, "torch"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# Tokens, student width, teacher width, vocabulary: one of each, full and ragged tiles (12 × 32) and blocks (96, 1,024).
SHAPES = [(1, 1, 1, 1), (2, 3, 5, 2), (13, 33, 8, 97), (40, 64, 31, 193), (7, 20, 16, 1030)]


def make_arguments(op: str, shape: tuple[int, int, int, int], seed: int = 0) -> Arguments:
    """The last token of cross-entropy is ignored where there are several."""
    normal, (tokens, width, teacher_width, vocabulary) = seeded(seed), shape
    if op == "linear_cross_entropy":
        target = torch.randint(0, vocabulary, (1, tokens), generator=torch.Generator().manual_seed(seed))
        target[:, max(1, tokens - 1) :] = -100
        return {"hidden": normal(1, tokens, width), "weight": normal(vocabulary, width), "target": target}
    mask = torch.ones(1, tokens, dtype=torch.bool)
    mask[:, max(1, tokens - 1) :] = False
    return {
        "student_hidden": normal(1, tokens, width),
        "student_weight": normal(vocabulary, width),
        "teacher_hidden": normal(1, tokens, teacher_width),
        "teacher_weight": normal(vocabulary, teacher_width),
        "mask": mask,
    }


def times_tokens(op: str, tokens: int, **options: Any) -> Callable[..., Tensor]:
    """The op times its tokens: gradients of a mean are so small that the tolerance, absolute below 1, would be none."""
    return lambda **arguments: getattr(F, op)(**arguments, **options).reshape(1) * tokens


OPS = ["linear_cross_entropy", "linear_kl_div"]
OPTIONS = [
    ("linear_cross_entropy", {}),
    ("linear_cross_entropy", {"label_smoothing": 0.1, "chunk_size": 5}),
    ("linear_kl_div", {}),
    ("linear_kl_div", {"temperature": 2.5, "chunk_size": 5}),
]


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("op", "options"), OPTIONS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_loss_matches_reference_in_value_and_gradient(
    backend, op, options, dtype, shape, contiguous, poisoned_memory
) -> None:
    call = times_tokens(op, shape[0], **options)
    assert_matches_reference(call, make_arguments(op, shape), dtype, backend=backend, contiguous=contiguous)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", BACKENDS)
@draw(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40), st.integers(1, 40), st.integers(1, 300)),
    chunk_size=st.one_of(st.none(), st.integers(1, 50)),
    seed=st.integers(0, 99),
)
def test_loss_matches_reference_at_any_size(backend, op, shape, chunk_size, seed) -> None:
    call = times_tokens(op, shape[0], chunk_size=chunk_size)
    assert_matches_reference(call, make_arguments(op, shape, seed), torch.float64, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_inputs_of_different_dtypes(backend) -> None:
    given = make_arguments("linear_kl_div", (13, 6, 5, 30))
    mixed = {
        "student_hidden": given["student_hidden"].bfloat16().requires_grad_(),
        "student_weight": given["student_weight"].float().requires_grad_(),
        "teacher_hidden": given["teacher_hidden"].half().requires_grad_(),
        "teacher_weight": given["teacher_weight"].bfloat16().requires_grad_(),
    }
    exact = {name: value.detach().double().requires_grad_() for name, value in mixed.items()}
    loss, expected = F.linear_kl_div(**mixed, backend=backend), F.linear_kl_div(**exact, backend="reference")
    assert loss.dtype == torch.float32
    assert relative_error(loss, expected) <= FORWARD[torch.float32]
    grads = [torch.autograd.grad(13 * out, list(values.values())) for out, values in ((loss, mixed), (expected, exact))]
    for value, grad, wanted in zip(mixed.values(), *grads, strict=True):
        assert grad.dtype == value.dtype
        assert relative_error(grad, wanted) <= GRADIENT[value.dtype]


@pytest.mark.parametrize("smoothing", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_cross_entropy_is_that_of_torch(backend, smoothing) -> None:
    given = make_arguments("linear_cross_entropy", (2, 20, 0, 50)) | {"target": torch.tensor([[3, 7]])}
    hidden, weight = given["hidden"].requires_grad_(), given["weight"].requires_grad_()
    options = {"ignore_index": 7, "label_smoothing": smoothing}
    loss = F.linear_cross_entropy(hidden, weight, given["target"], **options, backend=backend)
    expected = tf.cross_entropy((hidden @ weight.T)[0], given["target"][0], **options)
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)
    grads = [torch.autograd.grad(out, (hidden, weight)) for out in (loss, expected)]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-14)


@pytest.mark.skipif(not hasattr(tf, "linear_cross_entropy"), reason="torch has linear_cross_entropy from 2.13 on")
@pytest.mark.parametrize("backend", BACKENDS)
def test_cross_entropy_is_that_of_the_chunked_loss_of_torch(backend) -> None:
    given = make_arguments("linear_cross_entropy", (40, 20, 0, 50))
    hidden, weight = given["hidden"].requires_grad_(), given["weight"].requires_grad_()
    loss = F.linear_cross_entropy(hidden, weight, given["target"], backend=backend)
    options = torch.nn.LinearCrossEntropyOptions(batch_chunk_size=16)
    expected = tf.linear_cross_entropy(hidden[0], weight, given["target"][0], options=options)
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)
    grads = [torch.autograd.grad(out, (hidden, weight)) for out in (loss, expected)]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_divergence_is_that_of_torch(backend) -> None:
    given = make_arguments("linear_kl_div", (9, 20, 12, 50))
    mask = given.pop("mask")[0]
    given = {name: value.requires_grad_() for name, value in given.items()}
    loss = F.linear_kl_div(**given, temperature=3.0, mask=mask[None], backend=backend)
    student, teacher = (
        tf.log_softmax((given[f"{name}_hidden"] @ given[f"{name}_weight"].T)[0][mask] / 3, dim=-1)
        for name in ("student", "teacher")
    )
    expected = 9 * tf.kl_div(student, teacher, reduction="batchmean", log_target=True)
    torch.testing.assert_close(loss, expected, rtol=1e-13, atol=0)
    grads = [torch.autograd.grad(out, list(given.values())) for out in (loss, expected)]
    torch.testing.assert_close(*grads, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_student_that_is_its_teacher_has_no_loss_and_no_gradient(backend) -> None:
    hidden, weight = torch.randn(5, 30).requires_grad_(), torch.randn(400, 30).requires_grad_()
    loss = F.linear_kl_div(hidden, weight, hidden.detach(), weight.detach(), backend=backend)
    grads = torch.autograd.grad(loss, (hidden, weight))
    assert abs(loss.item()) <= FORWARD[torch.float32]
    assert max(grad.abs().max().item() for grad in grads) <= FORWARD[torch.float32]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("tokens", [0, 3])
@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_loss_without_a_token_that_counts_is_nan_with_gradients_of_zero(backend, tokens, op, poisoned_memory) -> None:
    given = make_arguments(op, (tokens, 4, 5, 6))
    given |= {"target": torch.full((1, tokens), -100)} if "target" in given else {"mask": given["mask"] & False}
    floats = [value.requires_grad_() for value in given.values() if value.is_floating_point()]
    loss = getattr(F, op)(**given, backend=backend)
    assert loss.isnan()
    assert not any(grad.abs().sum() for grad in torch.autograd.grad(loss, floats))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_what_a_token_that_does_not_count_holds_goes_nowhere(backend, value, op) -> None:
    clean = make_arguments(op, (6, 4, 5, 30))
    spoilt = {name: tensor.clone() for name, tensor in clean.items()}
    for name in spoilt:
        if "hidden" in name:
            spoilt[name][:, -1] = value
    results = []
    for given in (clean, spoilt):
        floats = [tensor.requires_grad_() for tensor in given.values() if tensor.is_floating_point()]
        loss = getattr(F, op)(**given, backend=backend)
        results.append([loss, *torch.autograd.grad(loss, floats)])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_and_infinity_pass_as_in_the_reference(backend, value, op) -> None:
    results = []
    for name in (backend, "reference"):
        given = make_arguments(op, (6, 4, 5, 230))
        hidden = given["hidden" if op == "linear_cross_entropy" else "student_hidden"]
        hidden[0, 1, 2] = value
        hidden.requires_grad_()
        loss = getattr(F, op)(**given, backend=name)
        results.append([loss, *torch.autograd.grad(loss, hidden)])
    assert results[1][0].isnan()
    torch.testing.assert_close(*results, rtol=1e-11, atol=1e-13, equal_nan=True)


@pytest.mark.parametrize("backend", BACKENDS)
def test_logits_far_apart_neither_overflow_nor_vanish(backend) -> None:
    normal = seeded(0)
    for dtype in (torch.float64, torch.float32):
        hidden, weight = (100 * normal(9, 8)).to(dtype), (10 * normal(300, 8)).to(dtype)
        target = torch.arange(9)
        loss = F.linear_cross_entropy(hidden, weight, target, backend=backend)
        expected = tf.cross_entropy(hidden.double() @ weight.double().T, target)
        assert relative_error(loss, expected) <= FORWARD[dtype]


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_of_float16_survive_a_loss_scale(backend) -> None:
    # The gradients of the mean, below 6e-8, would round to zero; the scaled ones need not.
    hidden, weight = torch.randn(64, 8).half().requires_grad_(), (torch.randn(4000, 8) * 0.01).half().requires_grad_()
    target = torch.arange(64)
    results = []
    for name in (backend, "reference"):
        loss = F.linear_cross_entropy(hidden, weight, target, backend=name) * 2.0**14
        results.append(torch.autograd.grad(loss, weight)[0].double())
    assert results[1].count_nonzero() > 0.9 * results[1].numel()
    assert relative_error(*results) <= GRADIENT[torch.float16]


@pytest.mark.native
@pytest.mark.skipif(not c_library.VARIANT, reason="the C kernels are not built on this machine")
@pytest.mark.parametrize(("op", "options"), OPTIONS)
def test_bits_do_not_depend_on_the_threads(op, options) -> None:
    results = []
    for threads in (1, 1, 2, 3):
        torch.set_num_threads(threads)
        given = {name: value.float() if value.is_floating_point() else value
                 for name, value in make_arguments(op, (37, 70, 33, 500)).items()}  # fmt: skip
        floats = [value.requires_grad_() for value in given.values() if value.is_floating_point()]
        loss = getattr(F, op)(**given, **options, backend="native")
        results.append([loss, *torch.autograd.grad(loss, floats)])
    torch.set_num_threads(1)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.native
@pytest.mark.skipif(not c_library.VARIANT, reason="the C kernels are not built on this machine")
def test_widths_over_the_longest_sum_in_one_go() -> None:
    arguments = make_arguments("linear_kl_div", (5, 1030, 2050, 14))
    for dtype in (torch.float64, torch.float32):
        scaled = {k: v / 30 if v.is_floating_point() else v for k, v in arguments.items()}
        assert_matches_reference(times_tokens("linear_kl_div", 5), scaled, dtype, backend="native")


def test_strided_weights_are_read_as_they_stand() -> None:
    given = make_arguments("linear_cross_entropy", (5, 6, 0, 40))
    weight = given["weight"].T.contiguous().T
    assert not weight.is_contiguous()
    assert not non_contiguous(weight).is_contiguous()
    losses = [F.linear_cross_entropy(given["hidden"], w, given["target"]) for w in (weight, given["weight"])]
    assert torch.equal(*losses)
