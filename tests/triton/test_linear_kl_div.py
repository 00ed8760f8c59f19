"""linear_kl_div and linear_cross_entropy on the backend `triton` against their references."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import neural_layers.functional as F
from tests.kernels.test_linear_losses import OPS, OPTIONS, make_arguments, times_tokens
from tests.op_checks import Arguments, assert_matches_reference, relative_error, seeded
from tests.tolerances import FORWARD, GRADIENT
from tests.triton.checks import on

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# Tokens, student width, teacher width, vocabulary: one of each; a vocabulary of one step, of several, and of one more.
SHAPES = [(1, 1, 1, 1), (2, 3, 5, 2), (13, 33, 8, 97), (3, 4, 6, 257)]


@pytest.fixture
def short_steps(monkeypatch) -> None:
    """Steps of 64 logits in float32, of 32 in float64, so that a row takes several."""
    pytest.importorskip("triton", reason="triton is not installed; pip install 'neural-layers[triton]'")
    from neural_layers.kernels.chunked_loss import triton_rows

    monkeypatch.setattr(triton_rows, "STEP", 256)


def on_device(op: str, device: str, tokens: int, **options):
    """The op times its tokens, as `times_tokens` says, on the device."""
    return on(device, times_tokens(op, tokens, **options))


def floats(given: Arguments) -> list[torch.Tensor]:
    return [value for value in given.values() if value.is_floating_point()]


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("op", "options"), OPTIONS)
def test_loss_matches_the_reference_in_value_and_gradient(
    device, op, options, dtype, shape, contiguous, short_steps, poisoned_memory
) -> None:
    call = on_device(op, device, shape[0], **options)
    assert_matches_reference(call, make_arguments(op, shape), dtype, backend="triton", contiguous=contiguous)


@pytest.mark.parametrize("op", OPS)
@given(
    shape=st.tuples(st.integers(1, 20), st.integers(1, 40), st.integers(1, 40), st.integers(1, 300)),
    chunk_size=st.one_of(st.none(), st.integers(1, 20)),
    seed=st.integers(0, 99),
)
def test_loss_matches_the_reference_at_any_size(device, op, shape, chunk_size, seed) -> None:
    call = on_device(op, device, shape[0], chunk_size=chunk_size)
    assert_matches_reference(call, make_arguments(op, shape, seed), torch.float64, backend="triton")


def test_inputs_of_different_dtypes(device) -> None:
    dtypes = (torch.bfloat16, torch.float32, torch.float16, torch.bfloat16)
    values = floats(make_arguments("linear_kl_div", (9, 6, 5, 30)))
    given = [value.to(dtype) for value, dtype in zip(values, dtypes, strict=True)]
    mixed = [x.to(device).requires_grad_() for x in given]
    exact = [x.double().requires_grad_() for x in given]
    loss, expected = F.linear_kl_div(*mixed, backend="triton"), F.linear_kl_div(*exact, backend="reference")
    assert loss.dtype == torch.float32
    assert relative_error(loss.cpu(), expected) <= FORWARD[torch.float32]
    grads = [torch.autograd.grad(9 * out, values) for out, values in ((loss, mixed), (expected, exact))]
    for value, grad, wanted in zip(given, *grads, strict=True):
        assert grad.dtype == value.dtype
        assert relative_error(grad.cpu(), wanted) <= GRADIENT[value.dtype]


@pytest.mark.parametrize(
    ("op", "options"), [("linear_cross_entropy", {"label_smoothing": 0.2}), ("linear_kl_div", {"temperature": 1.7})]
)
def test_gradients_match_finite_differences(device, op, options) -> None:
    given = {name: value.to(device) for name, value in make_arguments(op, (4, 3, 5, 9)).items()}
    names = [name for name, value in given.items() if value.is_floating_point()]

    def call(*values):
        return getattr(F, op)(**given | dict(zip(names, values, strict=True)), **options, backend="triton")

    assert torch.autograd.gradcheck(call, tuple(x.requires_grad_() for x in floats(given)), fast_mode=True)


@pytest.mark.parametrize("op", OPS)
def test_each_gradient_alone_is_that_of_all_together(device, op, short_steps) -> None:
    given = {name: value.to(device) for name, value in make_arguments(op, (5, 4, 3, 70)).items()}
    together = [x.requires_grad_() for x in floats(given)]
    loss = getattr(F, op)(**given, backend="triton")
    expected = torch.autograd.grad(loss, together)
    with torch.no_grad():
        assert torch.equal(getattr(F, op)(**given, backend="triton"), loss)
    for index, grad in enumerate(expected):
        alone = {name: value.detach() for name, value in given.items()}
        wanted = floats(alone)[index].requires_grad_()
        (actual,) = torch.autograd.grad(getattr(F, op)(**alone, backend="triton"), wanted)
        assert torch.equal(actual, grad)


def test_student_that_is_its_teacher_has_no_loss_and_no_gradient(device, short_steps) -> None:
    hidden, weight = (seeded(1)(*shape).float().to(device).requires_grad_() for shape in ((5, 30), (400, 30)))
    loss = F.linear_kl_div(hidden, weight, hidden.detach(), weight.detach(), backend="triton")
    assert abs(loss.item()) <= FORWARD[torch.float32]
    for grad in torch.autograd.grad(loss, (hidden, weight)):
        assert grad.abs().max().item() <= FORWARD[torch.float32]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("tokens", [0, 3])
def test_loss_without_a_token_that_counts_is_nan_with_gradients_of_zero(device, tokens, op, poisoned_memory) -> None:
    given = make_arguments(op, (tokens, 4, 5, 6))
    given |= {"target": torch.full((1, tokens), -100)} if "target" in given else {"mask": given["mask"] & False}
    given = {name: value.to(device) for name, value in given.items()}
    wanted = [value.requires_grad_() for value in floats(given)]
    loss = getattr(F, op)(**given, backend="triton")
    assert loss.isnan()
    assert not any(grad.abs().sum() for grad in torch.autograd.grad(loss, wanted))


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["student_hidden", "teacher_hidden"])
def test_nan_and_infinity_pass_as_in_the_reference(device, value, op, name, short_steps) -> None:
    name = "hidden" if op == "linear_cross_entropy" else name
    results = []
    for backend in ("triton", "reference"):
        given = {key: x.to(device) for key, x in make_arguments(op, (6, 4, 5, 130)).items()}
        given[name][0, 1, 2] = value
        loss = getattr(F, op)(**given | {name: given[name].requires_grad_()}, backend=backend)
        results.append([loss, *torch.autograd.grad(loss, given[name])])
    assert results[1][0].isnan()
    torch.testing.assert_close(*results, rtol=1e-11, atol=1e-13, equal_nan=True)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("value", [float("inf"), -float("inf")])
@pytest.mark.parametrize("op", OPS)
def test_a_row_of_nothing_but_infinities_has_no_loss(device, op, value, short_steps) -> None:
    given = make_arguments(op, (1, 2, 2, 70))
    given = {key: (x.abs() if x.is_floating_point() else x).to(device) for key, x in given.items()}
    for name in given:
        if "hidden" in name:
            given[name][0, 0, 1] = value
    losses = [getattr(F, op)(**given, backend=backend) for backend in ("triton", "reference")]
    assert all(loss.isnan() for loss in losses)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("op", OPS)
def test_logits_far_apart_neither_overflow_nor_vanish(device, op, dtype, short_steps) -> None:
    given = {key: x * 30 if x.is_floating_point() else x for key, x in make_arguments(op, (9, 8, 8, 300)).items()}
    rounded = {key: x.to(dtype) if x.is_floating_point() else x for key, x in given.items()}
    exact = {key: x.double() if x.is_floating_point() else x for key, x in rounded.items()}
    loss = getattr(F, op)(**{key: x.to(device) for key, x in rounded.items()}, backend="triton").cpu()
    expected = getattr(F, op)(**exact, backend="reference")
    assert expected > 1000
    assert relative_error(loss, expected) <= FORWARD[dtype]


@pytest.mark.parametrize(("op", "options"), OPTIONS)
def test_kernels_give_the_same_bits_again(device, op, options, short_steps) -> None:
    results = []
    for _ in range(2):
        given = {key: x.float() if x.is_floating_point() else x for key, x in make_arguments(op, (7, 9, 5, 90)).items()}
        given = {key: x.to(device) for key, x in given.items()}
        wanted = [x.requires_grad_() for x in floats(given)]
        loss = getattr(F, op)(**given, **options, backend="triton")
        first = torch.autograd.grad(loss, wanted, retain_graph=True)
        results += [[loss, *first], [loss, *torch.autograd.grad(loss, wanted)]]
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("op", OPS)
def test_ops_pass_the_checks_of_torch(device, op) -> None:
    options = (-100, 0.1, 3) if op == "linear_cross_entropy" else (2.0, None)
    given = {key: x.to(device) for key, x in make_arguments(op, (4, 4, 5, 9)).items()}
    wants = [True] * len(floats(given))
    grad_loss = torch.ones((), dtype=torch.float64, device=device)
    backward = getattr(torch.ops.neural_layers, f"{op}_backward").default
    torch.library.opcheck(backward, (grad_loss, *given.values(), *options, wants, "triton"))
    for value in floats(given):
        value.requires_grad_()
    forward = getattr(torch.ops.neural_layers, op).default
    torch.library.opcheck(forward, (*given.values(), *options, wants, "triton"))


@pytest.mark.parametrize("op", OPS)
def test_loss_is_traced_without_graph_break(device, op) -> None:
    def run(given):
        return getattr(F, op)(**given, backend="triton")

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)
    for tokens in (5, 8):
        given = {key: x.to(device) for key, x in make_arguments(op, (tokens, 4, 5, 9)).items()}
        wanted = [x.requires_grad_() for x in floats(given)]
        actual, expected = compiled(given), run(given)
        assert torch.equal(actual, expected)
        grads = [torch.autograd.grad(loss, wanted) for loss in (actual, expected)]
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("op", OPS)
def test_a_gradient_of_the_gradient_is_refused_in_words(device, op) -> None:
    given = {key: x.to(device) for key, x in make_arguments(op, (4, 4, 5, 9)).items()}
    wanted = [x.requires_grad_() for x in floats(given)]
    grads = torch.autograd.grad(getattr(F, op)(**given, backend="triton"), wanted, create_graph=True)
    with pytest.raises(NotImplementedError, match="backend='reference'"):
        grads[0].sum().backward()
