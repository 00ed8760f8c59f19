"""The C library: its variants, its threads, its dtypes, and the package without it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import neural_layers
import neural_layers.functional as F
from neural_layers.kernels import c_library, dispatch
from tests.op_checks import assert_matches_reference, seeded

ROOT = Path(__file__).resolve().parents[2]
HERE = [variant for variant in c_library.VARIANTS if c_library.runs(variant)]
needs_library = pytest.mark.skipif(not HERE, reason="the C kernels are not built on this machine")


def run_variant(variant: str, *arguments: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "NEURAL_LAYERS_CPU": variant}
    return subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )


@needs_library
def test_explain_shows_the_variant() -> None:
    explanation = neural_layers.explain("rms_norm", torch.ones(2, 3), torch.ones(3))
    assert (explanation.backend, explanation.detail) == ("native", c_library.VARIANT)
    assert f"native     chosen ({c_library.VARIANT})" in str(explanation)


@needs_library
@pytest.mark.parametrize("variant", [v for v in c_library.VARIANTS if v != c_library.VARIANT and v in HERE])
def test_kernels_pass_their_tests_in_every_variant_this_processor_runs(variant: str) -> None:
    done = run_variant(variant, "-m", "pytest", "-q", "-p", "no:xdist", "-m", "native", "tests/kernels")
    assert done.returncode == 0, done.stdout[-3000:]
    shown = run_variant(variant, "-c", "from neural_layers.kernels import c_library; print(c_library.VARIANT)")
    assert shown.stdout.strip() == variant


def test_variant_that_does_not_exist_is_refused_by_name() -> None:
    done = run_variant("avx1024", "-c", "import neural_layers")
    assert done.returncode != 0
    assert "NEURAL_LAYERS_CPU='avx1024' is not one of avx512, avx2, baseline" in done.stderr


def test_package_without_the_library_runs_on_torch_and_warns_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(c_library, "_LIBRARY", None)
    monkeypatch.setattr(dispatch, "_warned", set())
    x, weight = torch.randn(2, 3), torch.ones(3)
    assert "not built" in neural_layers.explain("rms_norm", x, weight).reasons["native"]
    with pytest.warns(neural_layers.SlowBackendWarning, match="C kernels are not built") as warned:
        [F.rms_norm(x, weight) for _ in range(2)]
    assert len(warned) == 1
    F.rms_norm(x, weight, backend="torch")
    with pytest.raises(neural_layers.BackendError, match="not built"):
        F.rms_norm(x, weight, backend="native")


@needs_library
def test_library_built_from_other_sources_is_not_called(tmp_path: Path) -> None:
    kernels = tmp_path / "neural_layers" / "kernels"
    shutil.copytree(ROOT / "neural_layers", kernels.parent)
    shutil.copytree(ROOT / "kernels", kernels)
    shown = "from neural_layers.kernels import c_library as c; print(c.VARIANT or c.MISSING)"
    command = [sys.executable, "-c", shown]
    run = lambda: subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout  # noqa: E731
    assert run().strip() == c_library.VARIANT
    with (kernels / "native.h").open("a") as header:
        header.write("/* another version */\n")
    assert "built from other sources" in run()


def test_install_without_a_compiler_succeeds(tmp_path: Path) -> None:
    environment = {**os.environ, "CC": "/nonexistent/cc"}
    command = [sys.executable, "setup.py", "-q", "build", "--build-base", str(tmp_path), "--build-lib", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "neural_layers" / "kernels" / "c_library.py").is_file()
    assert not list((tmp_path / "neural_layers" / "kernels").glob("_native*"))


@needs_library
@pytest.mark.native
def test_half_precision_is_read_and_rounded_as_torch_does() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
        rows = torch.stack([every, torch.full_like(every, 3)], dim=1)
        expected = F.rms_norm(rows, torch.ones(2, dtype=dtype), backend="reference")
        actual = F.rms_norm(rows, torch.ones(2, dtype=dtype), backend="native")
        assert torch.equal(actual.isnan(), expected.isnan())
        ulps = actual.nan_to_num().view(torch.int16).int() - expected.nan_to_num().view(torch.int16).int()
        assert ulps.abs().max() <= 1


@needs_library
@pytest.mark.native
def test_result_is_bit_identical_for_any_number_of_threads() -> None:
    normal = seeded(0)
    x, weight, grad = normal(333, 70).float(), normal(70).float(), normal(333, 70).float()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            inputs = (x.clone().requires_grad_(), weight.clone().requires_grad_())
            y = F.rms_norm(*inputs, backend="native")
            results.append((y.detach(), *torch.autograd.grad(y, inputs, grad)))
    finally:
        torch.set_num_threads(1)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@needs_library
@pytest.mark.native
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(0, 4), (1, 1), (3, 5, 67), (70, 33)])
@pytest.mark.parametrize("contiguous", [True, False])
def test_rms_norm_in_c_matches_reference(dtype, shape, contiguous, poisoned_memory) -> None:
    normal = seeded(0)
    arguments = {"x": normal(*shape), "weight": normal(shape[-1])}
    assert_matches_reference(F.rms_norm, arguments, dtype, backend="native", contiguous=contiguous)
