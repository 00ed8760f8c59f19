"""The losses from hidden states as citizens of PyTorch: operator checks, tracing, retained graphs, memory, errors."""

import pytest
import torch
import torch._functorch.config
from torch.utils.checkpoint import checkpoint

import neural_layers
import neural_layers.functional as F
from neural_layers.kernels import c_library
from tests.op_checks import Arguments, seeded

NATIVE = pytest.param(
    "native",
    marks=pytest.mark.skipif(not c_library.VARIANT, reason="the C kernels are not built on this machine"),
)
BACKENDS = [NATIVE, "torch"]
OPS = ["linear_cross_entropy", "linear_kl_div"]


def make_arguments(op: str, tokens: int = 7, requires_grad: bool = True) -> Arguments:
    normal = seeded(0)
    if op == "linear_cross_entropy":
        given = {"hidden": normal(tokens, 4), "weight": normal(9, 4), "target": torch.arange(tokens) % 9}
        given["target"][1] = -100
    else:
        given = {"student_hidden": normal(tokens, 4), "student_weight": normal(9, 4)}
        given |= {"teacher_hidden": normal(tokens, 5), "teacher_weight": normal(9, 5)}
        given["mask"] = torch.arange(tokens) % 3 > 0
    return {k: v.requires_grad_(requires_grad) if v.is_floating_point() else v for k, v in given.items()}


def floats(given: Arguments) -> list[torch.Tensor]:
    return [value for value in given.values() if value.is_floating_point()]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_custom_ops_pass_opcheck(backend, op) -> None:
    options = (-100, 0.1, 3) if op == "linear_cross_entropy" else (2.0, None)
    forward = getattr(torch.ops.neural_layers, op).default
    backward = getattr(torch.ops.neural_layers, f"{op}_backward").default
    given = make_arguments(op)
    wants = [True] * len(floats(given))
    torch.library.opcheck(forward, (*given.values(), *options, wants, backend))
    some = [index % 2 == 1 for index in range(len(wants))]
    bare = make_arguments(op, requires_grad=False)
    torch.library.opcheck(forward, (*bare.values(), *options, some, backend))
    # The backward op's own gradient is an error on purpose, so its inputs ask for none.
    grad_loss = torch.ones((), dtype=torch.float64)
    for flags in (wants, some):
        torch.library.opcheck(backward, (grad_loss, *bare.values(), *options, flags, backend))


@pytest.mark.parametrize(
    ("op", "options"),
    [("linear_cross_entropy", {"label_smoothing": 0.2}), ("linear_kl_div", {"temperature": 1.7})],
)
@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_gradients_match_finite_differences(backend, op, options) -> None:
    given = make_arguments(op)
    names = [name for name, value in given.items() if value.is_floating_point()]

    def call(*values):
        tensors = given | dict(zip(names, values, strict=True))
        return getattr(F, op)(**tensors, **options, chunk_size=3, backend=backend)

    assert torch.autograd.gradcheck(call, tuple(floats(given)))
    if backend == "reference":
        assert torch.autograd.gradgradcheck(call, tuple(floats(given)))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_each_gradient_alone_is_that_of_all_together(backend, op) -> None:
    together = make_arguments(op)
    expected = torch.autograd.grad(getattr(F, op)(**together, backend=backend), floats(together))
    for index, grad in enumerate(expected):
        alone = make_arguments(op, requires_grad=False)
        wanted = floats(alone)[index].requires_grad_()
        (actual,) = torch.autograd.grad(getattr(F, op)(**alone, backend=backend), wanted)
        assert torch.equal(actual, grad)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_loss_without_gradients_is_the_same(backend, op) -> None:
    given = make_arguments(op)
    with torch.no_grad():
        silent = getattr(F, op)(**given, backend=backend)
    assert not silent.requires_grad
    assert torch.equal(silent, getattr(F, op)(**given, backend=backend))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_backward_of_a_retained_graph_gives_the_same_bits_and_spares_the_first_result(backend, op) -> None:
    given = make_arguments(op)
    loss = getattr(F, op)(**given, backend=backend) * 3
    first = torch.autograd.grad(loss, floats(given), retain_graph=True)
    before = [grad.clone() for grad in first]
    second = torch.autograd.grad(loss, floats(given), retain_graph=True)
    third = torch.autograd.grad(loss * 2, floats(given))
    for grad, kept, again, doubled in zip(first, before, second, third, strict=True):
        assert torch.equal(grad, kept)
        assert torch.equal(again, kept)
        torch.testing.assert_close(doubled, 2 * kept, rtol=1e-14, atol=0)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_second_derivative_is_refused(backend, op) -> None:
    given = make_arguments(op)
    grads = torch.autograd.grad(getattr(F, op)(**given, backend=backend), floats(given), create_graph=True)
    with pytest.raises(NotImplementedError, match="backend='reference'"):
        grads[0].sum().backward()


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_checkpointed_loss_has_the_same_gradients(backend, op) -> None:
    given = make_arguments(op)
    plain = getattr(F, op)(**given, backend=backend)
    again = checkpoint(lambda: getattr(F, op)(**given, backend=backend), use_reentrant=False)
    assert torch.equal(plain, again)
    grads = [torch.autograd.grad(out, floats(given)) for out in (plain, again)]
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_lowers_no_product(backend, op) -> None:
    given = {k: v.float() if v.is_floating_point() else v for k, v in make_arguments(op, requires_grad=False).items()}
    plain = getattr(F, op)(**given, backend=backend)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(getattr(F, op)(**given, backend=backend), plain)


# A graph is retained, for which torch must not give away buffers of the forward pass.
@torch._functorch.config.patch(donated_buffer=False)
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_loss_is_traced_without_graph_break(backend, op, dynamic) -> None:
    def run(given):
        return getattr(F, op)(**given, backend=backend)

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for tokens in (5, 8):
        given = make_arguments(op, tokens)
        actual, expected = compiled(given), run(given)
        assert torch.equal(actual, expected)
        grads = [torch.autograd.grad(out, floats(given), retain_graph=True) for out in (actual, actual, expected)]
        assert all(torch.equal(a, c) and torch.equal(b, c) for a, b, c in zip(*grads, strict=True))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_exported_loss_takes_other_lengths(backend, op) -> None:
    class Loss(torch.nn.Module):
        def forward(self, *values):
            return getattr(F, op)(**dict(zip(given, values, strict=True)), backend=backend)

    given = make_arguments(op, 6, requires_grad=False)
    tokens = torch.export.Dim("tokens", min=2)
    dims = tuple({0: tokens} if value.shape[0] == 6 else None for value in given.values())
    program = torch.export.export(Loss(), tuple(given.values()), dynamic_shapes=(dims,))
    for length in (6, 11):
        other = make_arguments(op, length, requires_grad=False)
        assert torch.equal(program.module()(*other.values()), getattr(F, op)(**other, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
def test_no_tensor_as_large_as_the_logits_is_made(backend) -> None:
    tokens, vocabulary = 512, 2000
    hidden, weight = torch.randn(tokens, 8).requires_grad_(), torch.randn(vocabulary, 8).requires_grad_()
    target = torch.arange(tokens)
    with torch.profiler.profile(profile_memory=True) as profiled:
        F.linear_cross_entropy(hidden, weight, target, chunk_size=32, backend=backend).backward()
    largest = max(event.cpu_memory_usage for event in profiled.events())
    logits = tokens * vocabulary * 4
    assert 0 < largest <= logits / 8, f"{largest} bytes at once beside the {logits} of all the logits"


def test_explain_names_every_backend() -> None:
    given = make_arguments("linear_kl_div", requires_grad=False)
    found = neural_layers.explain("linear_kl_div", **given)
    assert {found.backend, *found.reasons} >= {"native", "torch", "reference"}


@pytest.mark.parametrize("value", [9, -1])
@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_target_out_of_range_is_named(backend, value) -> None:
    given = make_arguments("linear_cross_entropy", requires_grad=False)
    given["target"][3] = value
    with pytest.raises(ValueError, match=f"target holds {value}; expected 0 ≤ target < V=9, or ignore_index=-100"):
        F.linear_cross_entropy(**given, backend=backend)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"weight": torch.ones(9, 3)}, ValueError, r"weight has shape \(9, 3\); .* of shape \(7, 4\)"),
        ({"weight": torch.ones(0, 4)}, ValueError, "vocabulary of at least V=1"),
        ({"hidden": torch.ones(())}, ValueError, r"for hidden \(..., D\) of shape \(\)"),
        ({"hidden": torch.ones(7, 4, dtype=torch.int64)}, TypeError, "hidden has dtype torch.int64"),
        ({"target": torch.zeros(6, dtype=torch.int64)}, ValueError, r"target has shape \(6,\); expected \(7,\)"),
        ({"target": torch.zeros(7)}, TypeError, "target has dtype torch.float32; expected torch.int64"),
        ({"target": torch.zeros(7, dtype=torch.int64, device="meta")}, ValueError, "different devices"),
        ({"label_smoothing": 1.5}, ValueError, r"label_smoothing=1.5 must lie in \[0, 1\]"),
        ({"chunk_size": 0}, ValueError, "chunk_size=0 must be at least 1"),
    ],
)
def test_bad_arguments_of_cross_entropy_are_named(changes, error, message) -> None:
    with pytest.raises(error, match=message):
        F.linear_cross_entropy(**make_arguments("linear_cross_entropy", requires_grad=False) | changes)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"student_weight": torch.ones(8, 4)}, ValueError, "student's vocabulary has V=8 entries, the teacher's 9"),
        ({"teacher_weight": torch.ones(9, 4)}, ValueError, r"teacher_weight has shape \(9, 4\); .*\(7, 5\)"),
        ({"teacher_hidden": torch.ones(6, 5)}, ValueError, r"teacher_hidden has shape \(6, 5\); .*\(7, 4\)"),
        ({"temperature": 0.0}, ValueError, "temperature=0.0 must be positive and finite"),
        ({"temperature": float("inf")}, ValueError, "temperature=inf must be positive and finite"),
        ({"mask": torch.ones(7)}, TypeError, "mask has dtype torch.float32; expected torch.bool"),
        ({"mask": torch.ones(6, dtype=torch.bool)}, ValueError, r"mask has shape \(6,\); expected \(7,\)"),
        ({"chunk_size": -1}, ValueError, "chunk_size=-1 must be at least 1"),
    ],
)
def test_bad_arguments_of_the_divergence_are_named(changes, error, message) -> None:
    with pytest.raises(error, match=message):
        F.linear_kl_div(**make_arguments("linear_kl_div", requires_grad=False) | changes)
