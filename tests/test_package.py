"""The package as others meet it: imported bare, from a wheel, beside transformers."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import neural_layers
from tests.check_types import unpack_wheel

ROOT = Path(__file__).resolve().parent.parent


def run_python(code: str, *, cwd: Path = ROOT, path: str = "") -> str:
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


# As Python itself marks a module that cannot be imported; `find_spec` then answers that there is none.
BLOCK = """
import sys
sys.modules |= dict.fromkeys(("triton", "transformers", "onnx", "bitsandbytes"))
"""


def test_package_imports_and_runs_without_optional_dependencies() -> None:
    code = BLOCK + (
        "import torch\nfrom neural_layers import EnhancedBlock\n"
        "print(tuple(EnhancedBlock(dim=64, num_heads=4)(torch.randn(2, 7, 64)).shape))"
    )
    assert run_python(code) == "(2, 7, 64)"


def test_missing_optional_dependency_names_the_extra() -> None:
    code = BLOCK + ("try:\n    import neural_layers.models.cvm\nexcept ImportError as error:\n    print(error)\n")
    assert run_python(code) == "transformers is missing; pip install 'neural-layers[models]'"


def test_import_loads_no_optional_dependency() -> None:
    code = "import torch, sys\nbefore = set(sys.modules)\nimport neural_layers\nprint(*(set(sys.modules) - before))"
    loaded = {name.split(".")[0] for name in run_python(code).split()}
    assert "neural_layers" in loaded
    assert not loaded & {"transformers", "triton", "onnx", "bitsandbytes", "matplotlib", "sacrebleu", "tokenizers"}


def test_wheel_gives_the_public_names_outside_the_checkout(tmp_path) -> None:
    site = unpack_wheel(tmp_path)
    code = (
        "import neural_layers, neural_layers.functional as F, neural_layers.testing\n"
        "import neural_layers.models.cvm, neural_layers.distill.recipes.cvm, neural_layers.cli\n"
        "missing = [n for m in (neural_layers, F) for n in m.__all__ if not hasattr(m, n)]\n"
        "print(missing, neural_layers.__file__, neural_layers.kernels.rms_norm.__file__, neural_layers.models.__file__)"
    )
    printed = run_python(code, cwd=tmp_path, path=str(site))
    assert printed.startswith("[] ")
    assert printed.count(str(site)) == 3
    assert str(ROOT) + "/neural" not in printed
    assert (site / "neural_layers" / "py.typed").is_file()
    assert (site / "neural_layers" / "distill" / "classification" / "tables" / "synonyms.json").is_file()
    assert not [entry.name for entry in site.iterdir() if not entry.name.startswith("neural_layers")]


def test_transformers_is_whole_with_the_checkout_first_on_the_path() -> None:
    code = "from transformers import MambaForCausalLM, Trainer\nimport neural_layers\nprint(MambaForCausalLM.__name__)"
    assert run_python(code, path=str(ROOT)) == "MambaForCausalLM"


def test_an_op_is_registered_once_whichever_way_it_is_imported() -> None:
    code = (
        "import neural_layers.functional as F\nfrom neural_layers.kernels.rms_norm import rms_norm\n"
        "print(rms_norm is F.rms_norm)"
    )
    assert run_python(code) == "True"


@pytest.mark.parametrize("name", neural_layers.__all__)
def test_public_names_exist_and_are_documented(name) -> None:
    value = getattr(neural_layers, name)
    assert isinstance(value, str) or value.__doc__
