"""rms_norm, swiglu, geglu and apply_rotary on the backend `triton` against their references."""

from functools import partial

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import neural_layers.functional as F
from tests.op_checks import Arguments, assert_matches_reference, seeded
from tests.triton.checks import on

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
SHAPES = [(1, 1, 2), (3, 5, 6), (2, 0, 4), (0, 3, 4), (2, 63, 10)]
OPS = {
    "rms_norm": F.rms_norm,
    "swiglu": F.swiglu,
    "geglu": F.geglu,
    "geglu_erf": partial(F.geglu, approximate="none"),
    "apply_rotary": F.apply_rotary,
}


def make_arguments(op: str, shape: tuple[int, int, int], seed: int = 0) -> Arguments:
    normal = seeded(seed)
    batch, length, width = shape
    if op == "rms_norm":
        return {"x": normal(*shape), "weight": normal(width)}
    if op == "apply_rotary":
        angle = normal(length, width // 2)
        return {"x": normal(batch, length, 3, width), "cos": angle.cos(), "sin": angle.sin()}
    return {"gate": normal(*shape), "up": normal(*shape)}


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", OPS)
def test_kernels_match_the_reference_in_value_and_gradient(
    device, op, dtype, shape, contiguous, poisoned_memory
) -> None:
    arguments = make_arguments(op, shape)
    assert_matches_reference(on(device, OPS[op]), arguments, dtype, backend="triton", contiguous=contiguous)


@pytest.mark.parametrize("op", OPS)
@given(length=st.integers(0, 9), half=st.integers(1, 40), seed=st.integers(0, 99))
def test_kernels_match_the_reference_at_any_size(device, op, length, half, seed) -> None:
    arguments = make_arguments(op, (2, length, 2 * half), seed)
    assert_matches_reference(on(device, OPS[op]), arguments, torch.float64, backend="triton")


@pytest.mark.parametrize("op", OPS)
def test_gradients_match_finite_differences(device, op) -> None:
    arguments = {name: value.requires_grad_() for name, value in make_arguments(op, (2, 3, 4), seed=3).items()}

    def call(*values):
        return on(device, OPS[op])(**dict(zip(arguments, values, strict=True)), backend="triton")

    assert torch.autograd.gradcheck(call, tuple(arguments.values()), fast_mode=True)


@pytest.mark.parametrize("op", OPS)
def test_kernels_give_the_same_bits_again(device, op) -> None:
    arguments = {k: v.float().to(device).requires_grad_() for k, v in make_arguments(op, (2, 40, 6)).items()}
    outputs = [OPS[op](**arguments, backend="triton") for _ in range(2)]
    grads = [torch.autograd.grad(y, list(arguments.values()), torch.ones_like(y)) for y in outputs]
    assert torch.equal(*outputs)
    assert all(map(torch.equal, *grads))


@pytest.mark.parametrize("op", OPS)
def test_op_passes_the_checks_of_torch_and_is_traced(device, op) -> None:
    arguments = {k: v.to(device).requires_grad_() for k, v in make_arguments(op, (2, 3, 4)).items()}
    name, *options = {
        "rms_norm": ("rms_norm", 1e-6),
        "apply_rotary": ("apply_rotary", False),
        "swiglu": ("gated_activation", "silu"),
        "geglu": ("gated_activation", "gelu_tanh"),
        "geglu_erf": ("gated_activation", "gelu_erf"),
    }[op]
    custom = getattr(torch.ops.neural_layers, name).default
    torch.library.opcheck(custom, (*arguments.values(), *options, "triton"))
    compiled = torch.compile(lambda a: OPS[op](**a, backend="triton"), fullgraph=True, backend="aot_eager")
    actual, expected = compiled(arguments), OPS[op](**arguments, backend="triton")
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    grads = [torch.autograd.grad(y.sum(), list(arguments.values())) for y in (actual, expected)]
    torch.testing.assert_close(*grads, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_rms_norm_of_more_blocks_of_rows_than_programs(device, dtype) -> None:
    arguments = make_arguments("rms_norm", (1, 600, 6))
    assert_matches_reference(on(device, F.rms_norm), arguments, dtype, backend="triton")


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_rms_norm_of_rows_that_no_program_holds_whole(device, dtype, monkeypatch) -> None:
    from neural_layers.kernels.rms_norm import triton_backward, triton_forward

    monkeypatch.setattr(triton_forward, "WHOLE_ROW_BYTES", 64)
    monkeypatch.setattr(triton_forward, "STRETCH", 32)
    monkeypatch.setattr(triton_backward, "WHOLE_ROW_BYTES", 64)
    arguments = make_arguments("rms_norm", (2, 35, 150))
    assert_matches_reference(on(device, F.rms_norm), arguments, dtype, backend="triton")


def test_rms_norm_keeps_its_eps_in_float64(device) -> None:
    x = torch.full((1, 4), 1e-5, dtype=torch.float64, device=device)
    weight = torch.ones(4, dtype=torch.float64, device=device)
    actual, expected = (F.rms_norm(x, weight, eps=1e-7, backend=backend) for backend in ("triton", "reference"))
    torch.testing.assert_close(actual, expected, rtol=1e-14, atol=0)


def test_rms_norm_takes_a_weight_of_another_dtype(device) -> None:
    arguments = make_arguments("rms_norm", (2, 3, 6))
    x, weight = arguments["x"].to(device, torch.bfloat16), arguments["weight"].to(device, torch.float32)
    outputs = [F.rms_norm(x, weight.requires_grad_(), backend=backend) for backend in ("triton", "reference")]
    torch.testing.assert_close(*outputs, rtol=8e-3, atol=8e-3)
    grads = [torch.autograd.grad(y.sum(), weight)[0] for y in outputs]
    assert {grad.dtype for grad in grads} == {torch.float32}
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("op", ["swiglu", "geglu"])
def test_gates_read_the_halves_of_a_fused_projection_where_they_are(device, op) -> None:
    normal = seeded(4)
    fused = normal(2, 3, 2 * 1100).to(device)

    def halves(fused, **kwargs):
        gate, up = fused.chunk(2, dim=-1)
        return OPS[op](gate, up, **kwargs)

    assert_matches_reference(on(device, halves), {"fused": fused.cpu()}, torch.float32, backend="triton")
    # Axes that do not join to rows, and a gradient without strides.
    arguments = {"fused": normal(3, 2, 2200).transpose(0, 1)}
    assert_matches_reference(on(device, halves), arguments, torch.float32, backend="triton")
    gate = normal(2, 1100).to(device).requires_grad_()
    grads = [torch.autograd.grad(OPS[op](gate, gate, backend=b).sum(), gate)[0] for b in ("triton", "reference")]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
@pytest.mark.parametrize("op", ["swiglu", "geglu", "geglu_erf"])
def test_gates_of_large_and_broken_values_equal_those_of_torch(device, op) -> None:
    values = [0.0, -0.0, 20.0, -20.0, 200.0, -200.0, 1e30, -1e30, float("inf"), float("nan")]
    gate, up = torch.tensor(values, device=device), torch.ones(len(values), device=device)
    outputs = [OPS[op](gate, up, backend=backend) for backend in ("triton", "reference")]
    torch.testing.assert_close(*outputs, rtol=1e-6, atol=1e-6, equal_nan=True)


@pytest.mark.parametrize("heads", [1, 5, 40])
def test_rotary_takes_positions_that_differ_by_row(device, heads) -> None:
    normal = seeded(5)
    angle = normal(2, 3, 33)
    arguments = {"x": normal(2, 3, heads, 66), "cos": angle.cos(), "sin": angle.sin()}
    assert_matches_reference(on(device, F.apply_rotary), arguments, torch.float32, backend="triton")


def test_rotary_reads_the_heads_of_a_fused_projection_and_transposed_ones(device) -> None:
    normal = seeded(6)
    angle = normal(5, 4)
    tables = {"cos": angle.cos(), "sin": angle.sin()}

    def of_fused(fused, cos, sin, backend):
        return F.apply_rotary(fused[:, :, 1:4], cos, sin, backend=backend)

    def of_transposed(x, cos, sin, backend):
        return F.apply_rotary(x.transpose(1, 2), cos, sin, backend=backend)

    arguments = {"fused": normal(2, 5, 6, 8), **tables}
    assert_matches_reference(on(device, of_fused), arguments, torch.float32, backend="triton")
    arguments = {"x": normal(2, 3, 5, 8), **tables}
    assert_matches_reference(on(device, of_transposed), arguments, torch.float32, backend="triton")


def test_rotary_in_half_precision_takes_angles_of_float32(device) -> None:
    normal = seeded(7)
    x, angle = normal(1, 4, 2, 8).to(device, torch.bfloat16), normal(4, 4).to(device, torch.float32)
    outputs = [F.apply_rotary(x, angle.cos(), angle.sin(), backend=backend) for backend in ("triton", "reference")]
    torch.testing.assert_close(*outputs, rtol=0, atol=0)


def test_rotary_saves_x_only_where_the_angles_want_gradients(device) -> None:
    normal = seeded(8)
    x, angle = normal(1, 4, 2, 8).to(device).requires_grad_(), normal(4, 4).to(device)
    y = F.apply_rotary(x, angle.cos(), angle.sin(), backend="triton")
    saved = y.grad_fn.saved_tensors
    assert saved[0] is None
    assert torch.autograd.gradgradcheck(
        lambda x: F.apply_rotary(x, angle.cos(), angle.sin(), backend="triton"), x, fast_mode=True
    )


@pytest.mark.parametrize("op", ["rms_norm", "swiglu", "geglu"])
def test_a_gradient_of_the_gradient_is_refused_in_words(device, op) -> None:
    arguments = {k: v.to(device).requires_grad_() for k, v in make_arguments(op, (1, 2, 4)).items()}
    y = OPS[op](**arguments, backend="triton")
    grad = torch.autograd.grad(y.sum(), list(arguments.values()), create_graph=True)[0]
    with pytest.raises(NotImplementedError, match=rf"{op}.* no gradient of the gradient; use backend='torch'"):
        grad.sum().backward()
