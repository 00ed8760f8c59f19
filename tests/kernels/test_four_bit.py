"""quantize_4bit and dequantize_4bit: their backends agree in every bit, and with bitsandbytes."""

import io
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import neural_layers.functional as F
from neural_layers.kernels import c_library
from neural_layers.kernels.four_bit import BLOCK_SIZES, CODES, Quantized4bit, decode_absmax
from tests.op_checks import BACKENDS, seeded

needs_library = pytest.mark.skipif(not c_library.VARIANT, reason="the C kernels are not built here")
HALVES = [torch.float32, torch.bfloat16, torch.float16]
TENSORS = ("packed", "absmax", "offset", "nested_absmax")
SHAPES = [(64, 64), (7,), (), (1,), (33, 65), (5, 3, 11), (0, 4), (130, 128)]
SPECIAL = {
    "zeros": [0.0, -0.0],
    "NaN": [float("nan"), 1.0, 2.0],
    "infinities": [float("inf"), 1.0, -1.0, -float("inf")],
    "denormals": [1e-40, -1e-40],
    "large": [3e38, -1e38],
}


def weight_of(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    return (seeded(seed)(math.prod(shape)).view(shape) * 0.1).to(dtype)


def same_bits(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    if a is None or b is None:
        return a is b
    return a.dtype == b.dtype and torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(7), b.nan_to_num(7))


def assert_same_record(actual: Quantized4bit, expected: Quantized4bit) -> None:
    for name in TENSORS:
        assert same_bits(getattr(actual, name), getattr(expected, name)), name
    for name in ("quant_type", "block_size", "shape", "dtype"):
        assert getattr(actual, name) == getattr(expected, name), name


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_backends_agree_with_the_reference_in_every_bit(
    backend, double_quant, shape, quant_type, poisoned_memory
) -> None:
    for dtype in (*HALVES, torch.float64):
        weight = weight_of(shape, dtype)
        expected = F.quantize_4bit(weight, quant_type, 64, double_quant, backend="reference")
        actual = F.quantize_4bit(weight, quant_type, 64, double_quant, backend=backend)
        assert_same_record(actual, expected)
        restored = F.dequantize_4bit(actual, backend=backend)
        assert torch.equal(restored, F.dequantize_4bit(expected, backend="reference"))
        assert (restored.shape, restored.dtype) == (weight.shape, dtype)


@pytest.mark.parametrize("backend", BACKENDS)
@given(
    count=st.integers(0, 9000),
    block_size=st.sampled_from(BLOCK_SIZES),
    quant_type=st.sampled_from(sorted(CODES)),
    double_quant=st.booleans(),
    seed=st.integers(0, 99),
)
def test_backends_agree_with_the_reference_at_any_size(backend, count, block_size, quant_type, double_quant, seed):
    weight = weight_of((count,), torch.float32, seed)
    expected = F.quantize_4bit(weight, quant_type, block_size, double_quant, backend="reference")
    assert_same_record(F.quantize_4bit(weight, quant_type, block_size, double_quant, backend=backend), expected)
    restored = F.dequantize_4bit(expected, backend=backend)
    assert torch.equal(restored, F.dequantize_4bit(expected, backend="reference"))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("values", SPECIAL.values(), ids=SPECIAL)
@pytest.mark.parametrize("length", [64, 33])
def test_special_values_are_quantized_as_the_reference_does(backend, values, length) -> None:
    weight = torch.zeros(length)
    weight[: len(values)] = torch.tensor(values)
    for quant_type in CODES:
        expected = F.quantize_4bit(weight, quant_type, backend="reference")
        assert_same_record(F.quantize_4bit(weight, quant_type, backend=backend), expected)
        restored = F.dequantize_4bit(expected, backend=backend)
        assert same_bits(restored, F.dequantize_4bit(expected, backend="reference"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_value_on_a_border_takes_the_lower_code(backend) -> None:
    for quant_type, values in CODES.items():
        ascending = torch.tensor(sorted(set(values)))
        borders = (ascending[:-1] + ascending[1:]) / 2
        above = torch.nextafter(borders, torch.tensor(2.0))
        for points, expected in ((borders, ascending[:-1]), (above, ascending[1:])):
            weight = torch.cat([torch.ones(1), points, torch.zeros(63 - len(points))])
            restored = F.dequantize_4bit(F.quantize_4bit(weight, quant_type, backend=backend), backend=backend)
            torch.testing.assert_close(restored[1 : 1 + len(points)], expected, rtol=0, atol=0.003)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_a_weight_that_is_not_contiguous_is_quantized_in_row_major_order(backend) -> None:
    weight = weight_of((6, 96), torch.float32)
    assert_same_record(
        F.quantize_4bit(weight.T.contiguous().T, backend=backend), F.quantize_4bit(weight, backend="reference")
    )


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_is_quantized_again_stays_as_it_is(backend) -> None:
    for quant_type in CODES:
        once = F.dequantize_4bit(F.quantize_4bit(weight_of((32, 64), torch.float32), quant_type, backend=backend))
        again = F.dequantize_4bit(F.quantize_4bit(once, quant_type, backend=backend))
        torch.testing.assert_close(again, once, rtol=1e-6, atol=0)


def test_double_quantization_changes_the_absmax_by_less_than_a_percent_of_their_spread() -> None:
    weight = weight_of((512, 128), torch.float32)
    plain, double = F.quantize_4bit(weight), F.quantize_4bit(weight, double_quant=True)
    spread = plain.absmax.max() - plain.absmax.min()
    assert (decode_absmax(double) - plain.absmax).abs().max() < 0.01 * spread
    assert torch.equal(plain.packed, double.packed)
    assert double.absmax.dtype == torch.uint8


@pytest.mark.parametrize("backend", BACKENDS)
def test_quantization_is_traced_without_graph_break(backend) -> None:
    def run(weight):
        return F.dequantize_4bit(F.quantize_4bit(weight, "fp4", 32, True, backend=backend), backend=backend)

    weight = weight_of((5, 64), torch.float32).requires_grad_()
    restored = torch.compile(run, fullgraph=True, backend="aot_eager")(weight)
    assert torch.equal(restored, run(weight))
    assert not restored.requires_grad


@needs_library
@pytest.mark.native
def test_custom_ops_pass_opcheck() -> None:
    weight = weight_of((5, 64), torch.float32)
    torch.library.opcheck(torch.ops.neural_layers.quantize_4bit.default, (weight, "nf4", 64))
    for double_quant in (False, True):
        q = F.quantize_4bit(weight, double_quant=double_quant)
        given = (q.packed, q.absmax, q.offset, q.nested_absmax, q.quant_type, q.block_size, list(q.shape), q.dtype)
        torch.library.opcheck(torch.ops.neural_layers.dequantize_4bit.default, given)


@needs_library
@pytest.mark.native
def test_any_number_of_threads_gives_the_same_bits() -> None:
    weight, results = weight_of((300, 1001), torch.bfloat16), []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            quantized = F.quantize_4bit(weight, double_quant=True)
            results.append((quantized, F.dequantize_4bit(quantized)))
    finally:
        torch.set_num_threads(1)
    for quantized, restored in results[1:]:
        assert_same_record(quantized, results[0][0])
        assert torch.equal(restored, results[0][1])


def test_a_record_passes_through_export_and_moves_between_devices() -> None:
    class Dequantize(torch.nn.Module):
        def forward(self, quantized):
            return F.dequantize_4bit(quantized) * 2

    quantized, file = F.quantize_4bit(weight_of((5, 64), torch.float32), double_quant=True), io.BytesIO()
    torch.export.save(torch.export.export(Dequantize(), (quantized,)), file)
    file.seek(0)
    assert torch.equal(torch.export.load(file).module()(quantized), F.dequantize_4bit(quantized) * 2)
    assert_same_record(quantized.to("cpu"), quantized)
    assert quantized.to("meta").absmax.is_meta


@pytest.mark.parametrize("double_quant", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_bits_and_dequantized_weights_are_those_of_bitsandbytes(quant_type, double_quant) -> None:
    theirs = pytest.importorskip("bitsandbytes.functional", reason="the peer whose format this is")
    for dtype in HALVES:
        for block_size in BLOCK_SIZES:
            weight = weight_of((128, 1024), dtype, seed=block_size) * torch.linspace(0, 3, 128, dtype=dtype)[:, None]
            packed, state = theirs.quantize_4bit(
                weight, blocksize=block_size, quant_type=quant_type, compress_statistics=double_quant
            )
            ours = F.quantize_4bit(weight, quant_type, block_size, double_quant)
            assert torch.equal(ours.packed, packed)
            assert torch.equal(ours.absmax, state.absmax)
            if double_quant:
                assert torch.equal(ours.nested_absmax, state.state2.absmax)
                assert torch.equal(ours.offset, state.offset)
            if block_size < 2048:  # from there on it compiles with inductor first, for half a minute
                assert torch.equal(F.dequantize_4bit(ours), theirs.dequantize_4bit(packed, state))


@pytest.mark.parametrize("values", SPECIAL.values(), ids=SPECIAL)
def test_special_values_and_odd_sizes_are_quantized_as_bitsandbytes_does(values) -> None:
    theirs = pytest.importorskip("bitsandbytes.functional", reason="the peer whose format this is")
    for quant_type in CODES:
        for length in (len(values), 33, 64, 101):
            weight = torch.zeros(length)
            weight[: len(values)] = torch.tensor(values)
            packed, state = theirs.quantize_4bit(weight, quant_type=quant_type)
            ours = F.quantize_4bit(weight, quant_type)
            assert torch.equal(ours.packed, packed)
            assert same_bits(ours.absmax, state.absmax)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: F.quantize_4bit(torch.ones(3, dtype=torch.int8)), TypeError, "weight has dtype torch.int8"),
        (lambda: F.quantize_4bit(torch.ones(3), "int4"), ValueError, "quant_type='int4' must be 'nf4' or 'fp4'"),
        (lambda: F.quantize_4bit(torch.ones(3), block_size=48), ValueError, "block_size=48 must be one of 32, 64"),
        (lambda: F.dequantize_4bit(torch.ones(3)), TypeError, "quantized is a Tensor; expected the Quantized4bit"),
        (lambda: F.dequantize_4bit(broken(absmax=torch.ones(3))), ValueError, r"absmax has shape \(3,\).*\(2,\)"),
        (lambda: F.dequantize_4bit(broken(absmax=torch.ones(2).double())), TypeError, "absmax has dtype torch.float64"),
        (lambda: F.dequantize_4bit(broken(shape=(3, 64))), ValueError, r"packed has shape .*expected \(96, 1\)"),
        (lambda: F.dequantize_4bit(broken(offset=torch.ones(()))), ValueError, "offset and nested_absmax"),
    ],
)
def test_bad_arguments_are_named(call, error, message) -> None:
    with pytest.raises(error, match=message):
        call()


def broken(**changes) -> Quantized4bit:
    quantized = F.quantize_4bit(torch.ones(2, 64))
    fields = {name: getattr(quantized, name) for name in (*TENSORS, "quant_type", "block_size", "shape", "dtype")}
    return Quantized4bit(**fields | changes)
