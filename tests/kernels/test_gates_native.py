"""swiglu and geglu in C: dtypes, layouts, threads, infinity and NaN, huge inputs, and what torch asks of an op."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import neural_layers
import neural_layers.functional as F
from neural_layers.kernels import c_library
from neural_layers.kernels.swiglu import fused
from tests.op_checks import assert_matches_reference, relative_error, seeded
from tests.tolerances import FORWARD

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(not c_library.VARIANT, reason="the C kernels are not built on this machine"),
]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
ACTIVATIONS = ["silu", "gelu_tanh", "gelu_erf"]


def gate_op(activation: str):
    """The public function with that activation, of gate and up by name."""
    if activation == "silu":
        return F.swiglu
    approximate = {"gelu_tanh": "tanh", "gelu_erf": "none"}[activation]
    return lambda gate, up, backend="native": F.geglu(gate, up, approximate, backend=backend)


def value_and_gradients(activation: str, gate: Tensor, up: Tensor, grad: Tensor, backend: str) -> list[Tensor]:
    inputs = gate.detach().clone().requires_grad_(), up.detach().clone().requires_grad_()
    y = gate_op(activation)(*inputs, backend=backend)
    return [y.detach(), *torch.autograd.grad(y, inputs, grad)]


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("shape", [(1,), (0, 4), (3, 0), (2, 5, 67), (1, 1025), (33, 2048)])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gate_matches_reference_in_value_and_gradient(activation, dtype, shape, contiguous, poisoned_memory) -> None:
    normal = seeded(0)
    arguments = {"gate": 3 * normal(*shape), "up": normal(*shape)}
    assert_matches_reference(gate_op(activation), arguments, dtype, backend="native", contiguous=contiguous)


@given(
    batch=st.integers(0, 3),
    length=st.integers(0, 5),
    width=st.integers(0, 200),
    activation=st.sampled_from(ACTIVATIONS),
    seed=st.integers(0, 99),
)
def test_halves_of_a_fused_projection_are_read_where_they_are(batch, length, width, activation, seed) -> None:
    both = seeded(seed)(length, batch, 2 * width + 3)

    def call(both, backend):
        rest = both[..., 3:].transpose(0, 1)
        return gate_op(activation)(rest[..., :width], rest[..., width:], backend=backend)

    assert_matches_reference(call, {"both": both}, torch.float64, backend="native")
    y = gate_op(activation)(*both[..., 3:].chunk(2, dim=-1), backend="native")
    assert y.is_contiguous()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_is_right_over_the_whole_range_of_the_gate(activation, dtype) -> None:
    powers = 10.0 ** torch.arange(-300 if dtype == torch.float64 else -37, 38, dtype=torch.float64)
    gate = torch.cat([torch.linspace(-12, 12, 5001, dtype=torch.float64), powers, -powers]).to(dtype)
    up, grad = torch.ones_like(gate), torch.ones_like(gate)
    exact = value_and_gradients(activation, *(t.double() for t in (gate, up, grad)), "reference")
    actual = value_and_gradients(activation, gate, up, grad, "native")
    for out, ref in zip(actual, exact, strict=True):
        assert out.isfinite().all()
        # Each element by its own magnitude, with 1 at least. The reference's gradient is 0 · infinity for huge gates.
        error = ((out.double() - ref).abs() / ref.abs().clamp_min(1)).nan_to_num()
        assert error.max() <= FORWARD[dtype]
    huge = powers[-20:].to(dtype)
    for sign, slope in ((1, 1), (-1, 0)):
        y, grad_gate, grad_up = value_and_gradients(activation, sign * huge, *2 * [torch.ones_like(huge)], "native")
        assert torch.equal(y, slope * huge)
        assert torch.equal(grad_gate, torch.full_like(huge, slope))
        assert torch.equal(grad_up, slope * huge)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_nan_and_infinity_come_out_as_in_the_reference(activation, dtype) -> None:
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), 0.0, -0.0, 1.5, -1e4], dtype=dtype)
    grid = torch.cartesian_prod(special, special, special).repeat_interleave(3, dim=0)
    grad, gate, up = (column.contiguous() for column in grid.unbind(-1))
    expected = value_and_gradients(activation, gate, up, grad, "reference")
    actual = value_and_gradients(activation, gate, up, grad, "native")
    for out, ref in zip(actual, expected, strict=True):
        if out is actual[1]:  # the derivative at 0 is ½, and not the reference's 0 · infinity
            keep = (gate != 0) | ~(grad * up).isinf()
            assert torch.equal(out[~keep], 0.5 * (grad * up)[~keep])
            out, ref = out[keep], ref[keep]
        assert torch.equal(out.isnan(), ref.isnan())
        assert torch.equal(out.isinf(), ref.isinf())
        assert torch.equal(out.sign().nan_to_num(), ref.sign().nan_to_num())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_result_is_bit_identical_for_any_number_of_threads(activation) -> None:
    normal = seeded(0)
    inputs = [normal(3, 70_001).float() for _ in range(3)]
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(value_and_gradients(activation, *inputs, "native"))
    finally:
        torch.set_num_threads(1)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_match_finite_differences(activation) -> None:
    normal = seeded(3)
    inputs = normal(2, 3, 5).requires_grad_(), normal(2, 3, 5).requires_grad_()
    assert torch.autograd.gradcheck(lambda *x: gate_op(activation)(*x, backend="native"), inputs)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gate_in_c_is_a_well_formed_op(activation) -> None:
    normal = seeded(4)
    halves = normal(3, 4, 140).chunk(2, dim=-1)
    inputs = tuple(half.detach().requires_grad_() for half in halves)
    torch.library.opcheck(fused._forward, (*inputs, activation, "native"))
    torch.library.opcheck(fused._backward, (normal(3, 4, 70), *halves, activation, "native"))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gate_is_traced_without_graph_break_and_exported(activation) -> None:
    call = lambda gate, up: gate_op(activation)(gate, up, backend="native") * 2  # noqa: E731
    compiled = torch.compile(call, fullgraph=True, backend="aot_eager", dynamic=True)
    for length in (4, 7):
        inputs = [seeded(length)(2, length, 5).requires_grad_() for _ in range(2)]
        actual, expected = compiled(*inputs), call(*inputs)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
        for a, b in zip(*(torch.autograd.grad(y.sum(), inputs) for y in (actual, expected)), strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=0)

    class Block(torch.nn.Module):
        def forward(self, gate: Tensor, up: Tensor) -> Tensor:
            return call(gate, up)

    length = torch.export.Dim("length", min=2)
    inputs = tuple(tensor.detach() for tensor in inputs)
    exported = torch.export.export(Block(), inputs, dynamic_shapes=2 * ({1: length},))
    longer = tuple(torch.cat([tensor, tensor], dim=1) for tensor in inputs)
    torch.testing.assert_close(exported.module()(*longer), call(*longer), rtol=0, atol=0)


def test_gradient_of_the_gradient_is_refused_by_name() -> None:
    inputs = [seeded(5)(2, 5).requires_grad_() for _ in range(2)]
    grad = torch.autograd.grad(F.swiglu(*inputs, backend="native").sum(), inputs, create_graph=True)
    with pytest.raises(NotImplementedError, match="no gradient of the gradient; use backend='torch'"):
        torch.autograd.grad(grad[0].sum(), inputs)


def test_transforms_of_torch_func_run_on_another_backend() -> None:
    gate, up = seeded(5)(3, 5), seeded(6)(3, 5)
    expected = value_and_gradients("silu", gate, up, torch.ones_like(gate), "native")[1]
    gradient = torch.func.grad(lambda gate, up: F.swiglu(gate, up).sum())
    torch.testing.assert_close(gradient(gate, up), expected)
    torch.testing.assert_close(torch.vmap(gradient)(gate, up), expected)
    _, slope = torch.func.jvp(lambda gate: F.swiglu(gate, up), (gate,), (torch.ones_like(gate),))
    torch.testing.assert_close(slope, expected)


@pytest.mark.parametrize("shape", [(3, 5), (2, 1100)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_expanded_gradient_of_a_sum_is_read_where_it_is(dtype, shape) -> None:
    gate, up = (seeded(seed)(*shape).to(dtype) for seed in (5, 6))
    for grad in (
        torch.tensor(0.5, dtype=dtype).expand(shape),
        torch.full(shape[:1], 0.5, dtype=dtype)[:, None].expand(shape),
    ):
        expected = value_and_gradients("silu", gate, up, grad.contiguous(), "native")
        actual = value_and_gradients("silu", gate, up, grad, "native")
        assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_call_without_named_backend_gives_the_same_bits_and_passes_no_check_by(dtype) -> None:
    gate, up = (seeded(seed)(3, 70).to(dtype) for seed in (5, 6))
    for activation in ACTIVATIONS:
        expected = gate_op(activation)(gate, up, backend="native")
        assert torch.equal(gate_op(activation)(gate, up, backend="auto"), expected)
        for watched in (gate.clone().requires_grad_(), torch.nn.Parameter(gate)):
            assert gate_op(activation)(watched, up, backend="auto").requires_grad
    with pytest.raises(ValueError, match="up has shape"):
        F.swiglu(gate, up[:1])
    with pytest.raises(TypeError, match="up has dtype"):
        F.swiglu(gate, up.to(torch.float32 if dtype != torch.float32 else torch.float64))
    with pytest.raises(TypeError, match="gate has dtype"):
        F.geglu(gate.int(), up.int())
    with pytest.raises(ValueError, match="approximate='erf'"):
        F.geglu(gate, up, "erf")
    with neural_layers.use_backend(swiglu="reference", geglu="reference"):
        for activation in ACTIVATIONS:
            expected = gate_op(activation)(gate, up, backend="reference")
            assert torch.equal(gate_op(activation)(gate, up, backend="auto"), expected)


@pytest.mark.parametrize("shape", [(2050, 1027), (1025, 2, 1031)])
def test_results_larger_than_the_caches_are_right_to_the_last_element(shape, poisoned_memory) -> None:
    both = [torch.randn(*shape[:-1], 2 * shape[-1], generator=torch.Generator().manual_seed(0)) for _ in range(2)]
    for gate, up in ((both[0][..., : shape[-1]], both[0][..., shape[-1] :]), both):
        grad = torch.randn(gate.shape, generator=torch.Generator().manual_seed(1))
        expected = value_and_gradients("silu", gate, up, grad, "torch")
        for out, ref in zip(value_and_gradients("silu", gate, up, grad, "native"), expected, strict=True):
            assert relative_error(out, ref) <= FORWARD[torch.float32]
