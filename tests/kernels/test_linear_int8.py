"""linear_int8 against its definition: equal integers everywhere, values, gradients, sizes, extremes, errors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import neural_layers
import neural_layers.functional as F
from neural_layers.kernels.int8 import quantize_affine, quantize_rows
from neural_layers.kernels.linear_int8.pytorch import integer_sums
from tests.op_checks import BACKENDS, NATIVE, Arguments, assert_matches_reference, relative_error, seeded
from tests.tolerances import FORWARD

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# Few rows, the tiles of 6, their remainders.
ROWS = [0, 1, 2, 3, 4, 5, 16, 17, 18, 19, 23, 50]


def codes_of(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randint(-128, 128, shape, dtype=torch.int8, generator=torch.Generator().manual_seed(seed))


def arguments(rows: tuple[int, ...], inputs: int, outputs: int, *, static: bool = False, seed: int = 0) -> Arguments:
    normal = seeded(seed)
    made: Arguments = {
        "x": normal(*rows, inputs),
        "weight": codes_of(outputs, inputs, seed=seed),
        "scale": normal(outputs).abs() / 100 / max(inputs, 1) ** 0.5,
        "bias": normal(outputs),
    }
    if static:
        made["input_scale"] = torch.tensor(0.02, dtype=torch.float64)
        made["input_zero_point"] = torch.tensor(100, dtype=torch.int32)
    return made


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rows", [(3, 7), (2, 0), (1,), (), (19,)])
def test_backends_match_the_reference_in_value_and_gradient(
    backend, static, contiguous, dtype, rows, poisoned_memory
) -> None:
    given = arguments(rows, 133, 11, static=static)
    assert_matches_reference(F.linear_int8, given, dtype, backend=backend, contiguous=contiguous)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize(("inputs", "outputs"), [(1, 5), (64, 64), (200, 65), (65, 130), (0, 4), (7, 0), (1031, 3)])
def test_every_number_of_rows_gives_the_exact_sums(backend, static, inputs, outputs, poisoned_memory) -> None:
    for rows in ROWS:
        made = arguments((rows,), inputs, outputs, static=static, seed=rows)
        x, scales = made["x"].float(), (made.get("input_scale"), made.get("input_zero_point"))
        if static:
            codes, row_scale = quantize_affine(x, *scales).double() + 128 - 100, torch.tensor(0.02)
        else:
            codes, row_scale = quantize_rows(x)
            row_scale = row_scale.unsqueeze(1)
        # Scales and sums of a power of two show the integers themselves.
        y = F.linear_int8(
            x, made["weight"], torch.ones(outputs), input_scale=scales[0], input_zero_point=scales[1], backend=backend
        )
        expected = (codes.double() @ made["weight"].double().T).float() * row_scale
        assert torch.equal(y, expected), rows


@pytest.mark.parametrize("backend", [NATIVE])
@given(
    rows=st.integers(0, 40),
    inputs=st.integers(1, 300),
    outputs=st.integers(1, 140),
    static=st.booleans(),
    seed=st.integers(0, 99),
)
def test_c_gives_torchs_bits_but_for_the_last_product(backend, rows, inputs, outputs, static, seed) -> None:
    made = arguments((rows,), inputs, outputs, static=static, seed=seed)
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        given = {k: v.to(dtype) if v.is_floating_point() else v for k, v in made.items()}
        expected = F.linear_int8(**given, backend="torch")
        for threads in (1, 3):
            torch.set_num_threads(threads)
            try:
                assert relative_error(F.linear_int8(**given, backend=backend), expected) <= FORWARD[dtype]
            finally:
                torch.set_num_threads(1)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [1, 5, 17, 30])
def test_a_row_does_not_depend_on_its_neighbours(backend, rows) -> None:
    made = arguments((rows,), 100, 33)
    del made["bias"]
    given = {k: v.float() if v.is_floating_point() else v for k, v in made.items()}
    x = given.pop("x") * torch.logspace(-3, 3, rows).unsqueeze(1)
    together = F.linear_int8(x, **given, backend=backend)
    for row in range(rows):
        assert torch.equal(together[row], F.linear_int8(x[row], **given, backend=backend))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("rows", [1, 4, 20])
@pytest.mark.parametrize("static", [False, True])
def test_the_largest_sums_do_not_overflow(backend, rows, static) -> None:
    inputs = 1 << 16
    scales = (torch.tensor(1.0), torch.tensor(0, dtype=torch.int32)) if static else (None, None)
    x, weight = torch.full((rows, inputs), 255.0 if static else -127.0), torch.full((2, inputs), -128, dtype=torch.int8)
    weight[1] = 127
    y = F.linear_int8(x, weight, torch.ones(2), input_scale=scales[0], input_zero_point=scales[1], backend=backend)
    code = 255 if static else -127
    assert torch.equal(y, torch.tensor([code * -128.0 * inputs, code * 127.0 * inputs]).expand(rows, 2))


def test_more_inputs_than_fit_into_the_sums_go_to_torch() -> None:
    x, weight = torch.ones(2, (1 << 16) + 1), torch.full((3, (1 << 16) + 1), 127, dtype=torch.int8)
    explanation = neural_layers.explain("linear_int8", x, weight, torch.ones(3))
    assert explanation.backend == "torch"
    # 127 · 127 · 65537 with the scale 1 / 127
    y = F.linear_int8(x, weight, torch.ones(3))
    torch.testing.assert_close(y, torch.full((2, 3), 127.0 * 65537), rtol=1e-6, atol=0)


@pytest.mark.parametrize("shape", [(1, 1, 5), (3, 1, 4), (16, 40, 9), (17, 65, 33)])
def test_sums_by_torch_are_exact_at_every_width(shape) -> None:
    # torch._int_mm itself is not: with a single column it reads others' memory.
    rows, inputs, outputs = shape
    codes, weight = codes_of(rows, inputs), codes_of(outputs, inputs, seed=1)
    assert torch.equal(integer_sums(codes, weight), codes.long() @ weight.long().T)
    if inputs > 1:
        assert torch.equal(integer_sums(codes, weight), torch._int_mm(codes, weight.T).long())


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@pytest.mark.parametrize("rows", [4, 20])
def test_nan_and_infinity_make_their_row_nan_and_no_other(backend, rows) -> None:
    x = seeded(0)(rows, 70).float()
    x[0, 3], x[1, 69], x[2] = torch.nan, -torch.inf, 0
    weight, scale = codes_of(9, 70), torch.ones(9)
    y = F.linear_int8(x, weight, scale, backend=backend)
    assert y[:2].isnan().all()
    assert not y[2].any()
    assert y[3:].isfinite().all()
    static = {"input_scale": torch.tensor(0.02), "input_zero_point": torch.tensor(3, dtype=torch.int32)}
    z = F.linear_int8(x, weight, scale, **static, backend=backend)
    assert z[0].isnan().all()
    # Infinity is an end of the range, as any other number beyond it.
    x[1, 69] = -1e9
    assert torch.equal(z[1:], F.linear_int8(x, weight, scale, **static, backend=backend)[1:])


@pytest.mark.parametrize("backend", BACKENDS)
def test_extremes_of_float32_are_rounded_as_the_definition_says(backend) -> None:
    x = torch.tensor([[3e38, -3e38, 1.0], [1e-30, -5e-31, 0.0], [1e-38, 1e-40, 0.0], [2.5, 127.0, -0.5]])
    weight = torch.tensor([[1, 0, 0], [0, 1, 0], [0, 0, 1]], dtype=torch.int8)
    y = F.linear_int8(x, weight, torch.ones(3), backend=backend)
    torch.testing.assert_close(y, F.linear_int8(x, weight, torch.ones(3), backend="reference"), rtol=1e-6, atol=0)
    assert not y[2].any()  # below 2^-120
    assert y[3].tolist() == [2.0, 127.0, 0.0]  # ties to even


def test_gradient_is_that_of_the_restored_product_and_has_one_of_its_own() -> None:
    made = arguments((4,), 20, 6)
    x, bias = made["x"].requires_grad_(), made["bias"].requires_grad_()
    y = F.linear_int8(x, made["weight"], made["scale"], bias)
    grad = seeded(5)(4, 6).requires_grad_()
    grad_x, grad_bias = torch.autograd.grad(y, (x, bias), grad, create_graph=True)
    dense = made["weight"].double() * made["scale"].unsqueeze(1)
    torch.testing.assert_close(grad_x, grad @ dense)
    torch.testing.assert_close(grad_bias, grad.sum(0))
    torch.testing.assert_close(torch.autograd.grad(grad_x.sum(), grad)[0], dense.sum(1).expand(4, 6))


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_operator_passes_torchs_checks(backend) -> None:
    made = arguments((3,), 20, 6, static=True)
    op = torch.ops.neural_layers.linear_int8.default
    for name in ("x", "bias"):
        made[name].requires_grad_()
    for static in (True, False):
        scales = (made["input_scale"].float(), made["input_zero_point"]) if static else (None, None)
        values = (made["x"], made["weight"], made["scale"], made["bias"], *scales)
        torch.library.opcheck(op, (*values, backend))


def test_a_graph_is_captured_whole_and_the_meta_device_has_shapes() -> None:
    made = {k: v.float() if v.is_floating_point() else v for k, v in arguments((3,), 20, 6).items()}
    compiled = torch.compile(F.linear_int8, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(**made), F.linear_int8(**made))
    on_meta = F.linear_int8(**{k: v.to("meta") for k, v in made.items()})
    assert (on_meta.shape, on_meta.device.type) == ((3, 6), "meta")


def test_autocast_casts_x_as_for_any_linear() -> None:
    made = {k: v.float() if v.is_floating_point() else v for k, v in arguments((3,), 20, 6).items()}
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = F.linear_int8(**made)
    assert torch.equal(y, F.linear_int8(**(made | {"x": made["x"].bfloat16()})))


BAD = [
    ({"weight": torch.ones(4, 3)}, TypeError, r"weight has dtype torch.float32; expected torch.int8"),
    ({"x": torch.ones(2, 3).int()}, TypeError, "x has dtype torch.int32"),
    ({"x": torch.ones(2, 5)}, ValueError, r"x has shape \(2, 5\) and weight \(4, 3\)"),
    ({"scale": torch.ones(3)}, ValueError, r"scale has shape \(3,\); expected \(4,\)"),
    ({"bias": torch.ones(1)}, ValueError, r"bias has shape \(1,\); expected \(4,\)"),
    ({"input_scale": torch.tensor(1.0)}, ValueError, "must be given together"),
    (
        {"input_scale": torch.ones(1), "input_zero_point": torch.tensor(1, dtype=torch.int32)},
        ValueError,
        r"input_scale has shape \(1,\); expected \(\)",
    ),
    (
        {"input_scale": torch.tensor(1.0), "input_zero_point": torch.tensor(1)},
        TypeError,
        "input_zero_point has dtype torch.int64; expected torch.int32",
    ),
    ({"scale": torch.ones(4, device="meta")}, ValueError, "different devices"),
]


@pytest.mark.parametrize(("change", "error", "message"), BAD)
def test_arguments_that_do_not_fit_are_named(change, error, message) -> None:
    fitting = {"x": torch.ones(2, 3), "weight": torch.ones(4, 3, dtype=torch.int8), "scale": torch.ones(4)}
    with pytest.raises(error, match=message):
        F.linear_int8(**(fitting | change))
