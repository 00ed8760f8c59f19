"""docs/errors.md: every op and backend is in it, and every recorded error is within the tolerances."""

import pytest
import torch
from torch import Tensor

import neural_layers.functional as F
from neural_layers.kernels import c_library, triton_support
from neural_layers.kernels.dispatch import OPS
from tests.error_table import (
    DTYPES,
    PAGE,
    Row,
    backends_of,
    draw_examples,
    groups,
    is_within_tolerances,
    measure,
    page,
    read_page,
)
from tests.op_cases import CASES, cast
from tests.tolerances import FORWARD

RECORDED = read_page(PAGE.read_text(encoding="utf-8"))


def test_every_public_op_has_cases() -> None:
    assert set(CASES) == set(F.__all__)


def test_every_backend_of_every_op_is_recorded() -> None:
    recorded = {(row.op, row.backend.split()[0]) for row in RECORDED}
    expected = {(op, backend.name) for op in F.__all__ for backend in OPS[op].backends if backend.name != "reference"}
    assert recorded >= expected, f"make errors: {expected - recorded} are not in {PAGE.name}"


@pytest.mark.parametrize("op", F.__all__)
def test_every_recorded_error_is_within_the_tolerances(op) -> None:
    rows = [row for row in RECORDED if row.op == op]
    assert rows
    for row in rows:
        assert row.examples > 0, row
        assert is_within_tolerances(row), row


@pytest.mark.parametrize("op", F.__all__)
def test_drawn_arguments_are_taken_by_the_op_and_have_gradients(op) -> None:
    names = [backend.name for backend in OPS[op].backends if backend.name == "torch"]
    rows = measure(op, names, count=2, longest=9)
    assert {row.dtype for row in rows} == set(DTYPES)
    for row in rows:
        assert row.examples == 2
        assert row.value <= FORWARD[DTYPES[row.dtype]], row
    has_gradient = op not in ("quantize_4bit", "dequantize_4bit", "quantize_int4", "dequantize_int4")
    assert all((row.gradient is not None) == has_gradient for row in rows)


def test_the_same_arguments_are_drawn_each_time() -> None:
    first, second = (draw_examples(CASES["selective_scan"], 5, 20) for _ in range(2))
    assert len(first) == 5
    for one, other in zip(first, second, strict=True):
        assert list(one) == list(other)
        for a, b in zip(one.values(), other.values(), strict=True):
            assert torch.equal(a, b) if isinstance(a, Tensor) else a == b


def test_a_wrong_backend_shows_in_the_table(monkeypatch) -> None:
    right = F.rms_norm
    monkeypatch.setattr(F, "rms_norm", lambda *args, backend, **kw: right(*args, backend=backend, **kw) * (
        1.001 if backend == "torch" else 1
    ))  # fmt: skip
    rows = {row.dtype: row for row in measure("rms_norm", ["torch"], count=3, longest=9)}
    assert rows["float32"].value > 1e-4
    assert rows["float32"].gradient > 1e-4


def test_a_page_reads_back_as_it_was_written() -> None:
    rows = [
        Row("rms_norm", "native avx2", "float32", 1.2e-7, 3.4e-7, 25),
        Row("swiglu", "torch", "float64", 0.0, None, 3),
    ]
    assert read_page(page(rows)) == rows


def test_half_and_float64_arguments_have_the_same_values_after_rounding() -> None:
    (arguments,) = draw_examples(CASES["linear_4bit"], 1, 9)
    rounded = cast(arguments, torch.bfloat16)
    assert rounded["x"].dtype == rounded["quantized"].dtype == torch.bfloat16
    assert torch.equal(cast(rounded, torch.float64)["x"].bfloat16(), rounded["x"])


def test_groups_share_out_the_backends() -> None:
    assert "torch" in backends_of("flash_attention", "torch")
    assert backends_of("rms_norm", "native avx2") == ["native"]
    assert backends_of("linear_4bit", "native avx2") == ["native", "native_int8"]
    assert not [name for name in backends_of("linear_4bit", "torch") if name.startswith("native")]


def test_no_page_is_written_without_the_c_kernels_or_triton(monkeypatch) -> None:
    monkeypatch.setattr(c_library, "runs", lambda variant: True)
    monkeypatch.setattr(triton_support, "INSTALLED", False)
    with pytest.raises(SystemExit, match="triton is not installed"):
        groups()
    monkeypatch.setattr(c_library, "runs", lambda variant: False)
    with pytest.raises(SystemExit, match="the C kernels"):
        groups()


def test_an_error_above_the_tolerances_is_found() -> None:
    assert is_within_tolerances(Row("swiglu", "native avx2", "float32", 1e-7, 1e-7, 5))
    assert not is_within_tolerances(Row("swiglu", "native avx2", "float32", 1e-5, 1e-7, 5))
    assert not is_within_tolerances(Row("swiglu", "native avx2", "float32", 1e-7, 1e-4, 5))
    assert is_within_tolerances(Row("linear_4bit", "native_int8 avx512", "float32", 1e-2, 1e-7, 5))
    assert not is_within_tolerances(Row("linear_4bit", "native_int8 avx512", "float32", 1e-1, 1e-7, 5))
