"""dequantize_4bit and linear_4bit on the backend `triton` against their references."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import neural_layers.functional as F
from neural_layers.kernels.dequantize_4bit.pytorch import weight_in
from neural_layers.kernels.four_bit import BLOCK_SIZES, CODES, Quantized4bit
from tests.op_checks import assert_matches_reference, relative_error, seeded
from tests.tolerances import FORWARD, GRADIENT
from tests.triton.checks import on

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# (outputs, inputs, block_size): several tiles and nested blocks, blocks longer than a tile and than a row, more than
# one step of the kernel for few rows, blocks that straddle rows (by 4 weights, and by 1: odd rows), weights of nothing.
WEIGHTS = [
    (90, 96, 32), (5, 256, 256), (3, 128, 4096), (2, 1040, 64), (9, 140, 64), (5, 77, 32), (1, 1, 64), (4, 0, 64),
    (0, 8, 64),
]  # fmt: skip


def quantized_of(outputs: int, inputs: int, block_size: int = 64, *, seed: int = 0, **options) -> Quantized4bit:
    weight = seeded(seed)(outputs, inputs).float() * max(inputs, 1) ** -0.5
    return F.quantize_4bit(weight, block_size=block_size, **options)


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", [(64, 64), (7,), (), (33, 65), (5, 3, 11), (0, 4), (140, 128)])
@pytest.mark.parametrize("quant_type", sorted(CODES))
def test_dequantized_weights_are_those_of_the_reference_in_every_bit(
    device, quant_type, shape, double_quant, poisoned_memory
) -> None:
    for dtype in DTYPES:
        weight = (seeded(1)(math.prod(shape)).view(shape) * 0.1).to(dtype)
        quantized = F.quantize_4bit(weight, quant_type, 64, double_quant)
        restored = F.dequantize_4bit(quantized.to(device), backend="triton").cpu()
        assert (restored.shape, restored.dtype) == (weight.shape, dtype)
        assert torch.equal(restored, F.dequantize_4bit(quantized, backend="reference"))


@given(
    count=st.integers(0, 9000),
    block_size=st.sampled_from(BLOCK_SIZES),
    quant_type=st.sampled_from(sorted(CODES)),
    double_quant=st.booleans(),
)
def test_dequantized_weights_are_those_of_the_reference_at_any_size(
    device, count, block_size, quant_type, double_quant
) -> None:
    quantized = F.quantize_4bit(seeded(count)(count).float(), quant_type, block_size, double_quant)
    restored = F.dequantize_4bit(quantized.to(device), backend="triton").cpu()
    assert torch.equal(restored, F.dequantize_4bit(quantized, backend="reference"))


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
def test_blocks_with_nan_and_infinity_are_dequantized_as_by_the_reference(device) -> None:
    weight = seeded(2)(4, 64).float()
    weight[0, 3], weight[1, 5], weight[2] = float("nan"), float("inf"), 0.0
    for quant_type in CODES:
        quantized = F.quantize_4bit(weight, quant_type)
        restored = F.dequantize_4bit(quantized.to(device), backend="triton").cpu()
        expected = F.dequantize_4bit(quantized, backend="reference")
        torch.testing.assert_close(restored, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 5, 33), (2, 0, 32), (1, 128), (32,), (7, 128)])
def test_kernels_match_the_reference_in_value_and_gradient(device, contiguous, dtype, shape, poisoned_memory) -> None:
    normal = seeded(1)
    for double_quant in (False, True):
        quantized = quantized_of(11, shape[-1], double_quant=double_quant)
        arguments = {"x": normal(*shape), "bias": normal(11), "quantized": quantized}
        call = on(device, F.linear_4bit)
        assert_matches_reference(call, arguments, dtype, backend="triton", contiguous=contiguous)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight", WEIGHTS)
def test_every_layout_of_the_weight_and_number_of_rows_matches(device, dtype, weight, poisoned_memory) -> None:
    # What the kernel for few rows takes, the least more, and two blocks of rows.
    assert_matches_exact_weight(device, quantized_of(*weight), dtype, (1, 19))
    if weight[0] * weight[1]:
        quantized = quantized_of(*weight, double_quant=True, quant_type="fp4")
        assert_matches_exact_weight(device, quantized, dtype, (4, 5))


@pytest.mark.parametrize("dtype", DTYPES)
def test_many_rows_match(device, dtype, poisoned_memory) -> None:
    assert_matches_exact_weight(device, quantized_of(70, 96, double_quant=True), dtype, (33, 130))


def assert_matches_exact_weight(device: str, quantized: Quantized4bit, dtype: torch.dtype, counts: tuple[int, ...]):
    normal, (outputs, inputs) = seeded(2), quantized.shape
    exact, moved = weight_in(quantized, torch.float64), quantized.to(device)
    for rows in counts:
        x, bias = normal(rows, inputs).to(dtype), normal(outputs).to(dtype) if rows % 2 else None
        on_it = x.to(device).requires_grad_()
        y = F.linear_4bit(on_it, moved, None if bias is None else bias.to(device), backend="triton")
        expected = x.double() @ exact.T + (0 if bias is None else bias.double())
        assert (y.shape, y.dtype) == (expected.shape, dtype)
        error = relative_error(y.detach().cpu(), expected)
        assert error <= FORWARD[dtype], f"{rows} rows: error {error:.2e}"
        grad = normal(*y.shape).to(dtype)
        (grad_x,) = torch.autograd.grad(y, on_it, grad.to(device))
        error = relative_error(grad_x.cpu(), grad.double() @ exact)
        assert error <= GRADIENT[dtype], f"{rows} rows: error of the gradient {error:.2e}"


@given(
    sizes=st.tuples(st.integers(0, 20), st.integers(1, 40), st.integers(1, 150)),
    block_size=st.sampled_from(BLOCK_SIZES),
    quant_type=st.sampled_from(sorted(CODES)),
    double_quant=st.booleans(),
)
def test_kernels_match_the_reference_at_any_size(device, sizes, block_size, quant_type, double_quant) -> None:
    rows, outputs, inputs = sizes
    quantized = quantized_of(outputs, inputs, block_size, quant_type=quant_type, double_quant=double_quant)
    normal = seeded(3)
    arguments = {"x": normal(rows, inputs), "bias": normal(outputs), "quantized": quantized}
    for dtype in (torch.float64, torch.bfloat16):
        assert_matches_reference(on(device, F.linear_4bit), arguments, dtype, backend="triton")


@pytest.mark.parametrize("dtype", DTYPES)
def test_very_many_rows_go_through_a_copy_of_the_weight(device, dtype, monkeypatch) -> None:
    from neural_layers.kernels.linear_4bit import triton_kernels

    monkeypatch.setattr(triton_kernels, "COPIED", 6)
    copies, dequantize = [], triton_kernels.dequantize
    monkeypatch.setattr(triton_kernels, "dequantize", lambda *a: copies.append(dequantize(*a)) or copies[-1])
    normal = seeded(4)
    arguments = {"x": normal(2, 3, 77), "bias": normal(9), "quantized": quantized_of(9, 77, double_quant=True)}
    assert_matches_reference(on(device, F.linear_4bit), arguments, dtype, backend="triton")
    assert [copy.dtype for copy in copies] == [dtype, dtype]


@pytest.mark.parametrize("rows", [1, 5])
def test_gradients_match_finite_differences_to_the_second_order(device, rows) -> None:
    quantized, normal = quantized_of(5, 32, double_quant=True).to(device), seeded(5)
    values = (normal(rows, 32).to(device).requires_grad_(), normal(5).to(device).requires_grad_())
    call = lambda x, bias: F.linear_4bit(x, quantized, bias, backend="triton")  # noqa: E731
    assert torch.autograd.gradcheck(call, values, fast_mode=True)
    assert torch.autograd.gradgradcheck(call, values, fast_mode=True)


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
@pytest.mark.parametrize("rows", [3, 9])
def test_infinity_and_nan_in_x_stay_in_their_rows(device, rows) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        x = seeded(6)(rows, 256).to(dtype)
        x[0, 5], x[1, 200] = float("nan"), float("inf")
        y = F.linear_4bit(x.to(device), quantized_of(10, 256).to(device), backend="triton").cpu()
        assert y[0].isnan().all()
        assert not y[1].isfinite().any()
        assert y[2:].isfinite().all()


@pytest.mark.parametrize("rows", [2, 6, 40])
def test_bias_of_another_dtype_is_added_before_the_result_is_rounded(device, rows, monkeypatch) -> None:
    from neural_layers.kernels.linear_4bit import triton_kernels

    monkeypatch.setattr(triton_kernels, "COPIED", 40)
    x, quantized, bias = torch.ones(rows, 128, dtype=torch.bfloat16), quantized_of(3, 128), torch.full((3,), 1e-3)
    y = F.linear_4bit(x.to(device), quantized.to(device), bias.to(device), backend="triton").cpu()
    assert y.dtype == torch.bfloat16
    assert relative_error(y, x.double() @ weight_in(quantized, torch.float64).T + 1e-3) <= FORWARD[torch.bfloat16]


@pytest.mark.parametrize("rows", [1, 20])
def test_kernels_give_the_same_bits_again(device, rows) -> None:
    quantized = quantized_of(40, 256, double_quant=True).to(device)
    x = seeded(7)(rows, 256).float().to(device).requires_grad_()
    outputs = [F.linear_4bit(x, quantized, backend="triton") for _ in range(2)]
    grads = [torch.autograd.grad(y, x, torch.ones_like(y))[0] for y in outputs]
    assert torch.equal(*outputs)
    assert torch.equal(*grads)


def test_ops_pass_the_checks_of_torch(device) -> None:
    normal = seeded(8)
    for double_quant in (False, True):
        q = quantized_of(6, 128, double_quant=double_quant).to(device)
        x, bias = (normal(*shape).float().to(device).requires_grad_() for shape in ((3, 128), (6,)))
        tensors, layout = (q.packed, q.absmax, q.offset, q.nested_absmax), (q.quant_type, q.block_size, *q.shape)
        linear = torch.ops.neural_layers.linear_4bit.default
        torch.library.opcheck(linear, (x, *tensors, bias, *layout, False, "triton"))
        grad = normal(3, 6).float().to(device).requires_grad_()
        torch.library.opcheck(linear, (grad, *tensors, None, *layout, True, "triton"))
        constants = (q.quant_type, q.block_size, list(q.shape), q.dtype, "triton")
        torch.library.opcheck(torch.ops.neural_layers.dequantize_4bit.default, (*tensors, *constants))


def test_ops_are_traced_without_graph_break(device) -> None:
    def run(x, quantized, bias):
        y = F.linear_4bit(x, quantized, bias, backend="triton")
        return y + F.dequantize_4bit(quantized, backend="triton").sum()

    quantized = quantized_of(6, 128, double_quant=True).to(device)
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)
    for rows in (3, 7):
        x, bias = (torch.ones(*shape, device=device, requires_grad=True) for shape in ((rows, 128), (6,)))
        actual, expected = compiled(x, quantized, bias), run(x, quantized, bias)
        assert torch.equal(actual, expected)
        grads = [torch.autograd.grad(y.square().sum(), (x, bias)) for y in (actual, expected)]
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
