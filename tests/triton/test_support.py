"""When Triton runs and when it does not, and the interpreter that stands in for a GPU in the tests."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import neural_layers.functional as F
from neural_layers import explain
from neural_layers.kernels import triton_support
from neural_layers.kernels.dispatch import BackendError
from tests.check_types import ROOT

X, WEIGHT = torch.ones(2, 3), torch.ones(3)
OPS = ["rms_norm", "swiglu", "geglu", "apply_rotary", "causal_conv1d"]
OPS += ["dequantize_4bit", "linear_4bit", "linear_kl_div", "linear_cross_entropy"]
OPS += ["selective_scan", "selective_scan_step", "ssd_scan", "flash_attention"]


def run_python(code: str, **environment: str) -> str:
    kept = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=kept | environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_an_op_runs_without_importing_triton() -> None:
    code = (
        "import sys, torch, neural_layers.functional as F, neural_layers.kernels.triton_support as support\n"
        "F.rms_norm(torch.ones(2, 3), torch.ones(3)), F.swiglu(torch.ones(3), torch.ones(3))\n"
        "print(support.obstacle(torch.ones(3)), '|', 'triton' in sys.modules)"
    )
    assert run_python(code).endswith("| False")
    assert "on the CPU, and Triton's interpreter is off" in run_python(code)
    assert run_python(code, TRITON_INTERPRET="1") == "None | False"


def test_a_missing_triton_is_told_with_its_remedy(monkeypatch) -> None:
    monkeypatch.setattr(triton_support, "INSTALLED", False)
    with pytest.raises(BackendError, match=r"triton is not installed; pip install 'neural-layers\[triton\]'"):
        F.rms_norm(X, WEIGHT, backend="triton")


def test_a_changed_environment_does_not_change_what_was_imported(device, monkeypatch) -> None:
    before = triton_support.interpreting()
    monkeypatch.setenv("TRITON_INTERPRET", "0" if before else "1")
    assert triton_support.interpreting() == before


def test_tensors_that_triton_cannot_reach_are_told() -> None:
    pytest.importorskip("triton", reason="triton is not installed")
    assert "not on meta" in triton_support.obstacle(X.to("meta"))
    assert "lie on cpu and on meta" in triton_support.obstacle(X, None, 3, w=X.to("meta")) or not (
        triton_support.interpreting()
    )


def test_auto_passes_the_interpreter_over_and_says_why(device) -> None:
    x = X.to(device)
    explanation = explain("swiglu", x, x)
    if device == "cpu":
        assert explanation.backend != "triton"
        assert explanation.reasons["triton"] == "could run; runs in Triton's interpreter, which is for tests"
    else:
        assert explanation.backend == "triton"


@pytest.mark.parametrize("op", OPS)
def test_triton_stands_behind_native_and_before_torch(op) -> None:
    from neural_layers.kernels.dispatch import OPS as registered

    names = [backend.name for backend in registered[op].backends]
    order = "native", "native_int8", "triton", "sdpa", "torch", "reference"
    assert names == [name for name in order if name in names]
    assert "triton" in names


@given(value=st.floats(width=32))
def test_bfloat16_is_rounded_as_torch_rounds_it(device, value) -> None:
    if device != "cpu":
        pytest.skip("the interpreter is off")
    from tests.triton.interpreter import narrow, widen

    tensor = torch.tensor([value])
    expected = tensor.bfloat16()
    bits = torch.from_numpy(narrow(tensor.numpy())).view(torch.bfloat16)
    torch.testing.assert_close(bits, expected, rtol=0, atol=0, equal_nan=True)
    wide = torch.from_numpy(widen(expected.view(torch.uint16).numpy()))
    torch.testing.assert_close(wide, expected.float(), rtol=0, atol=0, equal_nan=True)


def test_arithmetic_on_bfloat16_in_a_kernel_is_refused(device) -> None:
    if device != "cpu":
        pytest.skip("the interpreter is off")
    import triton
    from triton.runtime.errors import InterpreterError

    from tests.triton import faulty_kernels

    x, out = torch.randn(8).bfloat16(), torch.zeros(8, dtype=torch.bfloat16)
    faulty_kernels.copy[(1,)](x, out, 8)
    torch.testing.assert_close(out, x, rtol=0, atol=0)
    for kernel in (faulty_kernels.double, faulty_kernels.total):
        assert isinstance(kernel, triton.runtime.interpreter.InterpretedFunction)
        with pytest.raises(InterpreterError, match="bfloat16"):
            kernel[(1,)](x, out, 8)


def test_a_comparison_of_scalars_makes_a_mask(device) -> None:
    from tests.triton import faulty_kernels

    x = torch.arange(8.0, device=device)
    for wanted, expected in ((1, x), (0, torch.zeros_like(x))):
        out = torch.zeros_like(x)
        faulty_kernels.copy_where[(1,)](x, out, wanted, 8)
        torch.testing.assert_close(out, expected, rtol=0, atol=0)
