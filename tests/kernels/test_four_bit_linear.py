"""linear_4bit against its reference: values and gradients, every layout of the weight, operator checks, errors."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import neural_layers
import neural_layers.functional as F
from neural_layers.kernels import c_library
from neural_layers.kernels.four_bit import BLOCK_SIZES, CODES, Quantized4bit
from tests.op_checks import BACKENDS, assert_matches_reference, relative_error, seeded
from tests.tolerances import FORWARD, INT8

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# (outputs, inputs, block_size): whole groups of 128 codes, blocks that straddle rows, odd rows, several tiles.
WEIGHTS = [
    (70, 256, 64), (5, 384, 256), (67, 128, 32), (33, 2048, 1024), (9, 1100, 64), (3, 77, 32),
    (1, 1, 64), (4, 0, 64), (0, 8, 64),
]  # fmt: skip
ROWS = [0, 1, 2, 3, 4, 5, 6, 7, 13, 131]
needs_library = pytest.mark.skipif(not c_library.VARIANT, reason="the C kernels are not built here")


def quantized_of(outputs: int, inputs: int, block_size: int = 64, *, seed: int = 0, **options) -> Quantized4bit:
    weight = seeded(seed)(outputs, inputs).float() * max(inputs, 1) ** -0.5
    return F.quantize_4bit(weight, block_size=block_size, **options)


def exact_weight(quantized: Quantized4bit) -> torch.Tensor:
    """The weight in float64, by the backend `torch`, because the reference's loops are slow."""
    from neural_layers.kernels.dequantize_4bit.pytorch import weight_in

    return weight_in(quantized, torch.float64)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 5, 33), (2, 0, 33), (1, 128), (33,), (7, 128)])
def test_backends_match_the_reference_in_value_and_gradient(backend, contiguous, dtype, shape, poisoned_memory) -> None:
    normal = seeded(1)
    for double_quant in (False, True):
        quantized = quantized_of(11, shape[-1], double_quant=double_quant)
        arguments = {"x": normal(*shape), "bias": normal(11), "quantized": quantized}
        assert_matches_reference(F.linear_4bit, arguments, dtype, backend=backend, contiguous=contiguous)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight", WEIGHTS)
def test_every_layout_of_the_weight_and_number_of_rows_matches(backend, dtype, weight, poisoned_memory) -> None:
    normal = seeded(2)
    for double_quant in (False, True)[: 1 + bool(weight[0] * weight[1])]:
        quantized = quantized_of(*weight, double_quant=double_quant, quant_type="fp4" if double_quant else "nf4")
        exact = exact_weight(quantized)
        for rows in ROWS:
            x, bias = normal(rows, weight[1]).to(dtype), normal(weight[0]).to(dtype) if rows % 2 else None
            y = F.linear_4bit(x, quantized, bias, backend=backend)
            expected = x.double() @ exact.T + (0 if bias is None else bias.double())
            assert (y.shape, y.dtype) == (expected.shape, dtype)
            error = relative_error(y, expected)
            assert error <= FORWARD[dtype], f"{rows} rows, double_quant={double_quant}: error {error:.2e}"


@pytest.mark.parametrize("backend", BACKENDS)
@given(
    sizes=st.tuples(st.integers(0, 9), st.integers(1, 70), st.integers(1, 300)),
    block_size=st.sampled_from(BLOCK_SIZES),
    quant_type=st.sampled_from(sorted(CODES)),
    double_quant=st.booleans(),
    seed=st.integers(0, 99),
)
def test_backends_match_the_reference_at_any_size(backend, sizes, block_size, quant_type, double_quant, seed) -> None:
    rows, outputs, inputs = sizes
    quantized = quantized_of(outputs, inputs, block_size, seed=seed, quant_type=quant_type, double_quant=double_quant)
    normal = seeded(seed)
    arguments = {"x": normal(rows, inputs), "bias": normal(outputs), "quantized": quantized}
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        assert_matches_reference(F.linear_4bit, arguments, dtype, backend=backend)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_gradients_match_finite_differences_to_the_second_order(backend) -> None:
    quantized, normal = quantized_of(5, 6, double_quant=True), seeded(3)
    values = (normal(2, 3, 6).requires_grad_(), normal(5).requires_grad_())
    call = lambda x, bias: F.linear_4bit(x, quantized, bias, backend=backend)  # noqa: E731
    assert torch.autograd.gradcheck(call, values)
    assert torch.autograd.gradgradcheck(call, values)


@pytest.mark.parametrize("backend", BACKENDS)
def test_infinity_and_nan_in_x_stay_in_their_rows(backend) -> None:
    for rows in (3, 9):
        for dtype in (torch.float32, torch.bfloat16):
            x = seeded(4)(rows, 256).to(dtype)
            x[0, 5], x[1, 200] = float("nan"), float("inf")
            y = F.linear_4bit(x, quantized_of(10, 256), backend=backend)
            assert y[0].isnan().all()
            assert not y[1].isfinite().any()
            assert y[2:].isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_bias_of_another_dtype_is_added_before_the_result_is_rounded(backend) -> None:
    x, quantized, bias = torch.ones(2, 128, dtype=torch.bfloat16), quantized_of(3, 128), torch.full((3,), 1e-3)
    y = F.linear_4bit(x, quantized, bias, backend=backend)
    assert y.dtype == torch.bfloat16
    assert relative_error(y, x.double() @ exact_weight(quantized).T + 1e-3) <= FORWARD[torch.bfloat16]


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_of_the_size_of_the_weight_is_saved_for_the_backward_pass(backend) -> None:
    saved: dict[int, int] = {}

    def pack(tensor):
        saved[tensor.data_ptr()] = tensor.numel() * tensor.element_size()
        return tensor

    quantized = quantized_of(256, 256)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        F.linear_4bit(torch.ones(2, 256, requires_grad=True), quantized, backend=backend)
    assert sum(saved.values()) == quantized.packed.numel() + 4 * quantized.absmax.numel()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dynamic", [False, True])
def test_linear_is_traced_without_graph_break(backend, dynamic) -> None:
    quantized = quantized_of(6, 128, double_quant=True)
    run = lambda x, q, bias: F.linear_4bit(x, q, bias, backend=backend)  # noqa: E731
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for rows in (3, 7):
        x, bias = torch.ones(rows, 128, requires_grad=True), torch.ones(6, requires_grad=True)
        actual, expected = compiled(x, quantized, bias), run(x, quantized, bias)
        assert torch.equal(actual, expected)
        grads = [torch.autograd.grad(y.square().sum(), (x, bias)) for y in (actual, expected)]
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_custom_op_passes_opcheck(backend) -> None:
    normal = seeded(5)
    for double_quant in (False, True):
        q = quantized_of(6, 128, double_quant=double_quant)
        x, bias = normal(3, 128).float().requires_grad_(), normal(6).float().requires_grad_()
        layout = (q.quant_type, q.block_size, *q.shape)
        tensors = (q.packed, q.absmax, q.offset, q.nested_absmax)
        torch.library.opcheck(torch.ops.neural_layers.linear_4bit.default, (x, *tensors, bias, *layout, False, backend))
        grad = normal(3, 6).float().requires_grad_()
        torch.library.opcheck(
            torch.ops.neural_layers.linear_4bit.default, (grad, *tensors, None, *layout, True, backend)
        )


def test_shapes_are_known_on_the_meta_device() -> None:
    y = F.linear_4bit(torch.ones(2, 3, 128, device="meta"), quantized_of(6, 128).to("meta"))
    assert (y.shape, y.device.type) == ((2, 3, 6), "meta")


def test_inside_autocast_x_is_cast_as_for_any_linear_layer() -> None:
    x, quantized = seeded(6)(3, 128).float(), quantized_of(6, 128)
    with torch.autocast("cpu", torch.bfloat16):
        y = F.linear_4bit(x, quantized)
        assert F.linear_4bit(x.double(), quantized).dtype == torch.float64
    assert torch.equal(y, F.linear_4bit(x.bfloat16(), quantized))


@needs_library
@pytest.mark.native
@pytest.mark.parametrize("backend", ["native", "native_int8"])
def test_any_number_of_threads_and_every_run_give_the_same_bits(backend) -> None:
    quantized, normal, results = quantized_of(300, 1024, double_quant=True), seeded(7), []
    require(backend, quantized)
    inputs = [normal(rows, 1024).to(dtype) for rows in (1, 5, 40) for dtype in (torch.float32, torch.bfloat16)]
    try:
        for threads in (1, 2, 5, 1):
            torch.set_num_threads(threads)
            results.append([F.linear_4bit(x, quantized, backend=backend) for x in inputs])
    finally:
        torch.set_num_threads(1)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def require(backend: str, quantized: Quantized4bit) -> None:
    try:
        neural_layers.explain("linear_4bit", torch.ones(1, quantized.shape[1]), quantized, backend=backend)
    except neural_layers.BackendError as reason:
        pytest.skip(str(reason))


# ---- native_int8 -----------------------------------------------------------------------------------------------------


@needs_library
@pytest.mark.native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weight", [(130, 256, 64), (67, 1024, 128), (65, 4096, 1024)])
def test_int8_stays_within_its_documented_error(dtype, weight, poisoned_memory) -> None:
    normal = seeded(8)
    for quant_type in CODES:
        for double_quant in (False, True):
            quantized = quantized_of(*weight, quant_type=quant_type, double_quant=double_quant)
            require("native_int8", quantized)
            exact = exact_weight(quantized)
            for rows in ROWS:
                x, bias = normal(rows, weight[1]).to(dtype), normal(weight[0]).to(dtype)
                y = F.linear_4bit(x, quantized, bias, backend="native_int8")
                assert y.dtype == dtype
                error = relative_error(y, x.double() @ exact.T + bias.double())
                assert error <= INT8[dtype], f"{rows} rows: error {error:.2e}"


@needs_library
@pytest.mark.native
def test_int8_is_taken_by_name_only_and_says_what_it_cannot() -> None:
    quantized, x = quantized_of(4, 128), torch.ones(2, 128)
    require("native_int8", quantized)
    assert "taken by name only" in neural_layers.explain("linear_4bit", x, quantized).reasons["native_int8"]
    by_name = F.linear_4bit(x, quantized, backend="native_int8")
    with neural_layers.use_backend(linear_4bit="native_int8"):
        assert torch.equal(F.linear_4bit(x, quantized), by_name)
    for bad_x, bad, reason in (
        (x.double(), quantized, "float64"),
        (torch.ones(2, 64), quantized_of(4, 64), "multiple of 128"),
        (x, quantized_of(4, 128, 32), "blocks of 64 or more"),
    ):
        with pytest.raises(neural_layers.BackendError, match=reason):
            F.linear_4bit(bad_x, bad, backend="native_int8")


@needs_library
@pytest.mark.native
def test_int8_has_the_gradient_of_the_exact_product_and_passes_on_nan() -> None:
    quantized = quantized_of(40, 256)
    require("native_int8", quantized)
    for rows in (3, 9):
        x = seeded(9)(rows, 256).float().requires_grad_()
        grads = [
            torch.autograd.grad(F.linear_4bit(x, quantized, backend=backend).sum(), x)[0]
            for backend in ("native", "native_int8")
        ]
        assert torch.equal(*grads)
        broken = x.detach().clone()
        broken[0, 5], broken[1, 200] = float("nan"), float("inf")
        y = F.linear_4bit(broken, quantized, backend="native_int8")
        assert not y[:2].isfinite().any()
        assert y[2:].isfinite().all()


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: F.linear_4bit(torch.ones(2, 3), quantized_of(4, 5)), ValueError, r"x has shape \(2, 3\).*\(4, 5\)"),
        (lambda: F.linear_4bit(torch.ones(()), quantized_of(4, 5)), ValueError, r"x has shape \(\)"),
        (lambda: F.linear_4bit(torch.ones(2, 5), quantized_of(4, 5), torch.ones(5)), ValueError, "bias has shape"),
        (lambda: F.linear_4bit(torch.ones(2, 5).int(), quantized_of(4, 5)), TypeError, "x has dtype torch.int32"),
        (lambda: F.linear_4bit(torch.ones(5), F.quantize_4bit(torch.ones(5))), ValueError, r"shape \(5,\); expected"),
        (lambda: F.linear_4bit(torch.ones(2, 5), torch.ones(4, 5)), TypeError, "quantized is a Tensor"),
        (lambda: F.linear_4bit(torch.ones(2, 5, device="meta"), quantized_of(4, 5)), ValueError, "different devices"),
    ],
)
def test_bad_arguments_are_named(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()
