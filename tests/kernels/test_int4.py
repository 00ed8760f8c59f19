"""The affine 4-bit ops: the record, its bits, and the linear layer over it against the definition."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import neural_layers.functional as F
from neural_layers.kernels.int4 import BLOCK_SIZES, QuantizedInt4
from tests.op_checks import BACKENDS, NATIVE, assert_matches_reference, relative_error, seeded
from tests.tolerances import FORWARD

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# (outputs, inputs, block_size): whole parts of 128 inputs and not, groups that are filled up, whole tasks of rows.
WEIGHTS = [(70, 256, 64), (33, 384, 256), (5, 200, 32), (35, 129, 16), (64, 640, 128), (3, 7, 256), (1, 1, 16)]
ROWS = [0, 1, 2, 3, 4, 5, 15, 16, 17, 30]


def weight_of(outputs: int, inputs: int, seed: int = 0, shift: float = 0.3) -> torch.Tensor:
    return (seeded(seed)(outputs, inputs).float() + shift) * max(inputs, 1) ** -0.5


def exact(quantized: QuantizedInt4) -> torch.Tensor:
    return F.dequantize_int4(replace(quantized, dtype=torch.float64), backend="torch")


@given(
    shape=st.tuples(st.integers(0, 5), st.integers(0, 140)),
    block_size=st.sampled_from(BLOCK_SIZES),
    seed=st.integers(0, 99),
    shift=st.sampled_from([0.0, 1.0, -5.0]),
)
def test_codes_are_those_of_the_definition_and_half_a_step_from_the_weight(shape, block_size, seed, shift) -> None:
    weight = weight_of(*shape, seed, shift)
    found, expected = (F.quantize_int4(weight, block_size, backend=name) for name in ("torch", "reference"))
    for name in ("packed", "scale", "zero_point"):
        assert torch.equal(getattr(found, name), getattr(expected, name)), name
    steps = found.scale.repeat_interleave(block_size, 1)[:, : shape[1]]
    # The zero point is rounded as well: the ends of the range may be another half step off.
    assert ((F.dequantize_int4(found) - weight).abs() <= steps * 1.001).all()


def test_ends_zeros_and_what_has_no_levels() -> None:
    weight = torch.zeros(6, 64)
    weight[0, :16] = torch.arange(16)
    weight[1] = -torch.linspace(1, 2, 64)
    weight[2, 5], weight[3, 7], weight[4] = torch.nan, torch.inf, 1e-40
    for backend in ("torch", "reference"):
        q = F.quantize_int4(weight, 64, backend=backend)
        restored = F.dequantize_int4(q)
        assert torch.equal(restored[0], weight[0])
        assert q.zero_point[1, 0] == 15
        assert restored[2:4].isnan().all()
        assert not restored[4:].any()
    # low nibble first
    assert q.packed[0, :2].tolist() == [0x10, 0x32]


def test_the_layout_is_what_onnx_runtime_reads() -> None:
    onnx = pytest.importorskip("onnx", reason="onnx is not installed")
    ort = pytest.importorskip("onnxruntime", reason="onnxruntime is not installed")
    import numpy as np
    from onnx import TensorProto, helper, numpy_helper

    weight, x = weight_of(6, 100), seeded(1)(3, 100).float()
    q = F.quantize_int4(weight, 32)
    groups = q.scale.shape[1]
    zeros = torch.nn.functional.pad(q.zero_point, (0, groups % 2))
    constants = {
        "B": q.packed.view(6, groups, 16).numpy(),
        "scales": q.scale.reshape(-1).numpy(),
        "zeros": (zeros[:, ::2] | zeros[:, 1::2] << 4).reshape(-1).numpy(),
    }
    node = helper.make_node(
        "MatMulNBits", ["x", *constants], ["y"], domain="com.microsoft", K=100, N=6, bits=4, block_size=32
    )
    graph = helper.make_graph(
        [node], "g", [helper.make_tensor_value_info("x", TensorProto.FLOAT, [3, 100])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [3, 6])],
        [numpy_helper.from_array(np.ascontiguousarray(value), name) for name, value in constants.items()],
    )  # fmt: skip
    opsets = [helper.make_opsetid("", 17), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=8)
    onnx.checker.check_model(model)
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    y = torch.from_numpy(session.run(None, {"x": x.numpy()})[0])
    torch.testing.assert_close(y, F.linear_int4(x, q), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(3, 5, 33), (2, 0, 33), (1, 128), (33,), (7, 128)])
def test_backends_match_the_reference_in_value_and_gradient(backend, contiguous, dtype, shape, poisoned_memory) -> None:
    normal = seeded(1)
    arguments = {"x": normal(*shape), "bias": normal(11), "quantized": F.quantize_int4(weight_of(11, shape[-1]), 32)}
    assert_matches_reference(F.linear_int4, arguments, dtype, backend=backend, contiguous=contiguous)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("weight", WEIGHTS)
def test_every_layout_of_the_weight_and_number_of_rows_matches(backend, dtype, weight, poisoned_memory) -> None:
    normal = seeded(2)
    quantized = F.quantize_int4(weight_of(*weight[:2]), weight[2])
    assert relative_error(F.dequantize_int4(quantized, backend=backend), exact(quantized)) <= FORWARD[torch.float32]
    for rows in ROWS:
        x, bias = normal(rows, weight[1]).to(dtype), normal(weight[0]).to(dtype) if rows % 2 else None
        y = F.linear_int4(x, quantized, bias, backend=backend)
        expected = x.double() @ exact(quantized).T + (0 if bias is None else bias.double())
        assert (y.shape, y.dtype) == (expected.shape, dtype)
        error = relative_error(y, expected)
        assert error <= FORWARD[dtype], f"{rows} rows: error {error:.2e}"


@pytest.mark.parametrize("backend", [NATIVE])
@given(
    sizes=st.tuples(st.integers(0, 18), st.integers(1, 70), st.integers(1, 400)),
    block_size=st.sampled_from(BLOCK_SIZES),
    spread=st.sampled_from([0, 3, 20]),
    seed=st.integers(0, 99),
)
def test_c_is_as_exact_as_float32_also_beside_outliers(backend, sizes, block_size, spread, seed) -> None:
    rows, outputs, inputs = sizes
    quantized = F.quantize_int4(weight_of(outputs, inputs, seed), block_size)
    normal = seeded(seed)
    # Neighbours that differ by up to 2^spread: the largest does not take the others' digits.
    x = (normal(rows, inputs) * torch.exp2(spread * torch.rand(rows, inputs, dtype=torch.float64))).float()
    for threads in (1, 2):
        torch.set_num_threads(threads)
        try:
            y = F.linear_int4(x, quantized, backend=backend)
        finally:
            torch.set_num_threads(1)
        assert relative_error(y, x.double() @ exact(quantized).T) <= FORWARD[torch.float32]


@pytest.mark.parametrize("backend", BACKENDS)
def test_numbers_of_any_size_keep_their_precision(backend) -> None:
    quantized = F.quantize_int4(weight_of(10, 256))
    for size in (1e-38, 1e-30, 1e-20, 1.0, 1e20, 1e30):
        x = seeded(3)(2, 256).float() * size
        y, expected = F.linear_int4(x, quantized, backend=backend), x.double() @ exact(quantized).T
        # The smallest results are denormal, with fewer digits.
        assert (y - expected).abs().max() <= expected.abs().max() * (1e-5 if size < 1e-35 else 2e-6), size


@pytest.mark.parametrize("backend", BACKENDS)
def test_infinity_and_nan_in_x_stay_in_their_rows(backend) -> None:
    for rows in (3, 20):
        x = seeded(4)(rows, 256).float()
        x[0, 5], x[1, 200] = float("nan"), float("inf")
        y = F.linear_int4(x, F.quantize_int4(weight_of(10, 256, shift=0)), backend=backend)
        assert y[0].isnan().all()
        assert not y[1].isfinite().any()
        assert y[2:].isfinite().all()


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_gradients_match_finite_differences_to_the_second_order(backend) -> None:
    quantized, normal = F.quantize_int4(weight_of(5, 6), 16), seeded(3)
    values = (normal(2, 3, 6).requires_grad_(), normal(5).requires_grad_())
    call = lambda x, bias: F.linear_int4(x, quantized, bias, backend=backend)  # noqa: E731
    assert torch.autograd.gradcheck(call, values)
    assert torch.autograd.gradgradcheck(call, values)


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_operators_pass_torchs_checks(backend) -> None:
    q, normal = F.quantize_int4(weight_of(5, 40), 16), seeded(3)
    x, bias = normal(2, 40).float().requires_grad_(), normal(5).float().requires_grad_()
    op = torch.ops.neural_layers.linear_int4.default
    torch.library.opcheck(op, (x, q.packed, q.scale, q.zero_point, bias, 16, backend))
    restore = torch.ops.neural_layers.dequantize_int4.default
    torch.library.opcheck(restore, (q.packed, q.scale, q.zero_point, 16, 40, torch.float32))


def test_a_graph_is_captured_whole_and_the_meta_device_has_shapes() -> None:
    weight, x = weight_of(5, 40), seeded(3)(2, 40).float()

    def both(x: torch.Tensor) -> torch.Tensor:
        return F.linear_int4(x, F.quantize_int4(weight, 32)) + F.dequantize_int4(F.quantize_int4(weight, 32)).sum()

    torch.testing.assert_close(torch.compile(both, fullgraph=True, backend="aot_eager")(x), both(x))
    on_meta = F.linear_int4(x.to("meta"), F.quantize_int4(weight.to("meta"), 32))
    assert (on_meta.shape, on_meta.device.type) == ((2, 5), "meta")


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: F.quantize_int4(torch.ones(2, 3), 48), ValueError, "block_size=48 must be one of 16, 32"),
        (lambda: F.quantize_int4(torch.ones(3)), ValueError, r"weight has shape \(3,\); expected \(out, in\)"),
        (lambda: F.quantize_int4(torch.ones(2, 3).int()), TypeError, "weight has dtype torch.int32"),
        (lambda: F.dequantize_int4(torch.ones(2)), TypeError, "quantized is a Tensor; expected the QuantizedInt4"),
        (lambda: F.linear_int4(torch.ones(2, 5), Q), ValueError, r"x has shape \(2, 5\); expected \(..., in\)"),
        (lambda: F.linear_int4(torch.ones(2, 3), Q, torch.ones(2)), ValueError, r"bias has shape \(2,\); expected"),
        (
            lambda: F.dequantize_int4(replace(Q, scale=torch.ones(4, 2))),
            ValueError,
            r"scale has shape \(4, 2\); expected \(4, 1\) for a weight of shape \(4, 3\) in groups of 64",
        ),
        (lambda: F.dequantize_int4(replace(Q, packed=Q.packed.int())), TypeError, "packed has dtype torch.int32"),
        (lambda: F.dequantize_int4(replace(Q, scale=Q.scale.to("meta"))), ValueError, "scale lies on meta"),
    ],
)
def test_arguments_that_do_not_fit_are_named(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()


Q = F.quantize_int4(torch.ones(4, 3))
