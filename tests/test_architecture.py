"""The layers of the library, read off the source: who imports whom, and how long files are."""

import ast
import sys
from pathlib import Path

import pytest

from tests.check_types import ROOT, source_files

LAYERS = {"kernels": 0, "neural_layers": 1, "models": 2, "distill": 3, "benchmarks": 4, "tests": 5}


def sources() -> list[Path]:
    return source_files("*.py", "*.c", "*.h")


def imported_modules(source: str) -> list[str]:
    modules = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            modules.append(node.module or "")
    return modules


def layer_of(module: str) -> str | None:
    """The root folder that a module of ours lies in, None for others' modules."""
    parts = module.split(".")
    if parts[0] == "tests":
        return "tests"
    if parts[0] != "neural_layers":
        return None
    return parts[1] if len(parts) > 1 and parts[1] in LAYERS and parts[1] != "tests" else "neural_layers"


def violations(path: Path, source: str) -> list[str]:
    found = []
    for module in imported_modules(source):
        if module.split(".")[0] in ("kernels", "models", "distill", "benchmarks"):
            found.append(f"{path} imports {module}; it must be neural_layers.{module}")
        layer = layer_of(module)
        is_cli = path.parts[:2] == ("neural_layers", "cli")
        if layer and path.parts[0] in LAYERS and LAYERS[layer] > LAYERS[path.parts[0]] and not is_cli:
            found.append(f"{path} imports {module}, of a layer above its own")
    return found


def test_imports_run_downward_and_name_the_package() -> None:
    files = [path for path in sources() if path.suffix == ".py"]
    assert len(files) > 40
    assert not [v for path in files for v in violations(path, (ROOT / path).read_text())]


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("kernels/a.py", "from neural_layers.norm import RMSNorm"),
        ("neural_layers/a.py", "import neural_layers.models.cvm"),
        ("models/a.py", "def f():\n    from neural_layers.distill import losses"),
        ("models/a.py", "import kernels.rms_norm"),
        ("distill/a.py", "from models import cvm"),
    ],
)
def test_an_import_that_runs_upward_is_found(path, source) -> None:
    assert violations(Path(path), source)


def test_kernels_import_only_torch_and_the_standard_library() -> None:
    # triton only where an op's kernels for it stand, and in what they share
    allowed = sys.stdlib_module_names | {"torch", "neural_layers"}
    for path in sources():
        if path.suffix == ".py" and path.parts[0] == "kernels":
            roots = {module.split(".")[0] for module in imported_modules((ROOT / path).read_text())}
            roots -= {"triton"} if path.name.startswith("triton_") else set()
            assert roots <= allowed, f"{path} imports {roots - allowed}"


def test_kernels_folder_is_no_package_of_its_own() -> None:
    assert not (ROOT / "kernels" / "__init__.py").exists(), "transformers would take it for the package `kernels`"


def test_no_file_is_longer_than_500_lines() -> None:
    lengths = {path: len((ROOT / path).read_text().splitlines()) for path in sources()}
    assert not {path: n for path, n in lengths.items() if n > (400 if path.parts[0] == "kernels" else 500)}
