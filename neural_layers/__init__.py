"""Transformer blocks that are correct and fast everywhere: on a CPU, on a GPU, in float64, in ONNX Runtime."""

from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent
if (_ROOT / "pyproject.toml").is_file() and (_ROOT / "kernels").is_dir():
    # In a checkout `neural_layers.kernels`, `.models`, … are the folders beside this one; see setup.py.
    __path__.append(str(_ROOT))

from neural_layers._version import __version__  # noqa: E402
from neural_layers.kernels.dispatch import BackendError, explain, use_backend  # noqa: E402

__all__ = ["BackendError", "__version__", "explain", "use_backend"]
