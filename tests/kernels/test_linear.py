"""The op linear: values and gradients against the reference, and the C kernel for few rows."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import neural_layers
import neural_layers.functional as F
from neural_layers.kernels.linear.native import MOST_ROWS
from neural_layers.linear import Linear
from tests.op_checks import NATIVE, assert_matches_reference, relative_error, seeded
from tests.tolerances import FORWARD


def arguments(rows: tuple[int, ...], inputs: int, outputs: int, bias: bool, seed: int = 0) -> dict:
    normal = seeded(seed)
    made = {"x": normal(*rows, inputs), "weight": normal(outputs, inputs) / inputs**0.5}
    return {**made, "bias": normal(outputs)} if bias else made


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("rows", "bias"), [((1,), True), ((2, 3), False), ((0, 2), True), ((), True), ((9,), False)])
@pytest.mark.parametrize("contiguous", [True, False])
def test_torch_backend_matches_reference_in_value_and_gradient(dtype, rows, bias, contiguous, poisoned_memory) -> None:
    assert_matches_reference(F.linear, arguments(rows, 17, 5, bias), dtype, backend="torch", contiguous=contiguous)


@pytest.mark.parametrize("backend", [NATIVE])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@given(
    rows=st.integers(1, MOST_ROWS),
    inputs=st.integers(1, 200),
    outputs=st.integers(1, 140),
    bias=st.booleans(),
    seed=st.integers(0, 99),
)
def test_few_rows_in_c_match_reference_at_any_size(backend, dtype, rows, inputs, outputs, bias, seed) -> None:
    given = {name: value.to(dtype) for name, value in arguments((rows,), inputs, outputs, bias, seed).items()}
    expected = F.linear(**{name: value.double() for name, value in given.items()}, backend="reference")
    for threads in (1, 3):
        torch.set_num_threads(threads)
        try:
            assert relative_error(F.linear(**given, backend=backend), expected) <= FORWARD[dtype]
        finally:
            torch.set_num_threads(1)


@pytest.mark.parametrize("backend", [NATIVE])
def test_large_layers_give_the_same_bits_on_any_number_of_threads(backend) -> None:
    given = {name: value.float() for name, value in arguments((1, 2), 513, 1025, True).items()}
    found = []
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            found.append(F.linear(**given, backend=backend))
        finally:
            torch.set_num_threads(1)
    assert torch.equal(*found)


@pytest.mark.parametrize("backend", [NATIVE])
def test_transposed_weights_and_nan_reach_the_result(backend) -> None:
    weight = seeded(1)(33, 20).float().T
    x = seeded(2)(2, 33).float()
    torch.testing.assert_close(F.linear(x, weight, backend=backend), x @ weight.T)
    x[1, 4] = float("nan")
    y = F.linear(x, weight, backend=backend)
    assert y[1].isnan().all()
    assert y[0].isfinite().all()


@pytest.mark.parametrize("backend", [NATIVE])
def test_a_gradient_autocast_many_rows_and_half_go_to_torch(backend) -> None:
    x, weight = torch.ones(1, 4), torch.ones(3, 4)
    assert neural_layers.explain("linear", x, weight).backend == "native"
    assert neural_layers.explain("linear", x, weight.requires_grad_()).backend == "torch"
    assert neural_layers.explain("linear", torch.ones(MOST_ROWS + 1, 4), weight.detach()).backend == "torch"
    assert neural_layers.explain("linear", x.bfloat16(), weight.detach().bfloat16()).backend == "torch"
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        assert F.linear(x, weight).dtype == torch.bfloat16
        with pytest.raises(neural_layers.BackendError, match="autocast"):
            F.linear(x, weight, backend="native")


def test_linear_layer_equals_torchs_and_takes_its_weights() -> None:
    torch.manual_seed(0)
    ours, theirs = Linear(30, 7), torch.nn.Linear(30, 7)
    ours.load_state_dict(theirs.state_dict())
    for rows in (1, 3, 50):
        x = torch.randn(rows, 30)
        with torch.no_grad():
            torch.testing.assert_close(ours(x), theirs(x))
    compiled = torch.compile(ours, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), theirs(x))
    with neural_layers.use_backend(linear="reference"):
        torch.testing.assert_close(ours(x), theirs(x))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: F.linear(torch.ones(2, 3), torch.ones(4, 2)), r"x has shape \(2, 3\) and weight \(4, 2\)"),
        (lambda: F.linear(torch.ones(2, 3), torch.ones(3)), r"weight \(3,\)"),
        (
            lambda: F.linear(torch.ones(2, 3), torch.ones(4, 3), torch.ones(3)),
            r"bias has shape \(3,\); expected \(4,\)",
        ),
        (lambda: F.linear(torch.ones(9, 3), torch.ones(4, 2)), r"x has shape \(9, 3\) and weight \(4, 2\)"),
        (lambda: F.linear(torch.ones(9, 3), torch.ones(4, 3), torch.ones(1)), r"bias has shape \(1,\)"),
        (lambda: F.linear(torch.ones(9, 3), torch.ones(4, 3, device="meta")), "weight on meta"),
        (
            lambda: F.linear(torch.ones(9, 3), torch.ones(4, 3), torch.ones(4, device="meta")),
            "different devices: .* bias on meta",
        ),
        (lambda: F.linear(torch.ones(()), torch.ones(4, 0)), r"x has shape \(\)"),
        (lambda: F.linear(torch.ones(9, 3), torch.ones(())), r"weight \(\)"),
    ],
)
def test_bad_shapes_and_devices_name_what_was_given(call, message) -> None:
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("rows", [1, 9])
def test_what_is_no_float_is_refused(rows) -> None:
    x, weight = torch.ones(rows, 3), torch.ones(4, 3)
    for wrong in ((x.int(), weight.int()), (x, weight, torch.ones(4).int()), (x.cfloat(), weight.cfloat())):
        with pytest.raises(TypeError, match="expected one of"):
            F.linear(*wrong)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_many_rows_are_torchs_product_in_value_and_gradient(dtype) -> None:
    normal = seeded(3)
    leaves = [tensor.to(dtype).requires_grad_() for tensor in (normal(3, 5, 7), normal(4, 7), normal(4))]
    found, expected = F.linear(*leaves), torch.nn.functional.linear(*leaves)
    assert torch.equal(found, expected)
    assert all(map(torch.equal, torch.autograd.grad(found.sum(), leaves), torch.autograd.grad(expected.sum(), leaves)))
    assert F.linear(*(tensor.to("meta") for tensor in leaves)).shape == (3, 5, 4)


def test_many_rows_pass_through_autocast_transforms_and_subclasses() -> None:
    x, weight = seeded(4)(9, 6).float(), seeded(5)(3, 6).float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert F.linear(x, weight).dtype == torch.bfloat16
    torch.testing.assert_close(torch.func.vmap(F.linear, (0, None))(x.expand(2, 9, 6), weight)[1], x @ weight.T)

    class Named(torch.Tensor):
        pass

    assert type(F.linear(x.as_subclass(Named), weight)) is Named
