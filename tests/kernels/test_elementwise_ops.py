"""rms_norm, swiglu, geglu and apply_rotary against their references."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import neural_layers.functional as F
from tests.op_checks import assert_matches_reference, seeded

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1, 2), (3, 5, 6), (2, 0, 4), (0, 3, 4), (2, 63, 10)]


def make_arguments(op: str, shape: tuple[int, int, int], seed: int) -> dict:
    normal = seeded(seed)
    batch, length, width = shape
    if op == "rms_norm":
        return {"x": normal(*shape), "weight": normal(width)}
    if op == "apply_rotary":
        angle = normal(length, width // 2)
        return {"x": normal(batch, length, 3, width), "cos": angle.cos(), "sin": angle.sin()}
    return {"gate": normal(*shape), "up": normal(*shape)}


OPS = ["rms_norm", "swiglu", "geglu", "apply_rotary"]


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_torch_backend_matches_reference_in_value_and_gradient(op, dtype, shape, contiguous, poisoned_memory) -> None:
    arguments = make_arguments(op, shape, seed=0)
    assert_matches_reference(getattr(F, op), arguments, dtype, backend="torch", contiguous=contiguous)


@pytest.mark.parametrize("op", OPS)
@given(length=st.integers(0, 9), half=st.integers(1, 8), seed=st.integers(0, 99))
def test_torch_backend_matches_reference_at_any_size(op, length, half, seed) -> None:
    arguments = make_arguments(op, (2, length, 2 * half), seed)
    assert_matches_reference(getattr(F, op), arguments, torch.float64, backend="torch")


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_gradients_match_finite_differences(op, backend) -> None:
    arguments = {k: v.requires_grad_() for k, v in make_arguments(op, (2, 3, 4), seed=3).items()}
    names = list(arguments)
    call = lambda *values: getattr(F, op)(**dict(zip(names, values, strict=True)), backend=backend)  # noqa: E731
    assert torch.autograd.gradcheck(call, tuple(arguments.values()))
    assert torch.autograd.gradgradcheck(call, tuple(arguments.values()))


@pytest.mark.parametrize("op", OPS)
def test_op_is_traced_without_graph_break(op) -> None:
    arguments = make_arguments(op, (2, 3, 4), seed=3)
    compiled = torch.compile(lambda a: getattr(F, op)(**a), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(arguments), getattr(F, op)(**arguments))


def test_rotary_takes_positions_that_differ_by_row() -> None:
    normal = seeded(5)
    angle = normal(2, 3, 4)
    arguments = {"x": normal(2, 3, 2, 8), "cos": angle.cos(), "sin": angle.sin()}
    assert_matches_reference(F.apply_rotary, arguments, torch.float32, backend="torch")


def test_rms_norm_of_large_float16_does_not_overflow() -> None:
    x = torch.full((1, 4), 60000.0, dtype=torch.float16)
    torch.testing.assert_close(F.rms_norm(x, torch.ones(4, dtype=torch.float16)), torch.ones_like(x))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: F.rms_norm(torch.ones(2, 3), torch.ones(4)), r"weight has shape \(4,\).*\(2, 3\)"),
        (lambda: F.rms_norm(torch.ones(2, 3), torch.ones(3), eps=-1.0), "eps=-1.0"),
        (lambda: F.swiglu(torch.ones(2, 3), torch.ones(2, 4)), r"up has shape \(2, 4\)"),
        (lambda: F.geglu(torch.ones(2), torch.ones(2), approximate="erf"), "'erf' must be 'tanh' or 'none'"),
        (lambda: F.apply_rotary(torch.ones(1, 2, 1, 3), torch.ones(2, 1), torch.ones(2, 1)), "K=3 must be even"),
        (lambda: F.apply_rotary(torch.ones(1, 2, 1, 4), torch.ones(3, 2), torch.ones(2, 2)), r"cos has shape \(3, 2\)"),
    ],
)
def test_bad_arguments_are_named(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()
