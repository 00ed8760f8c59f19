"""ONNX: models as graphs that ONNX Runtime serves, with their state.

`export_onnx(model, folder)` writes and verifies; `OnnxModel(folder)` and `OnnxTranslator(folder)` serve, without
transformers.
"""

from importlib import import_module
from typing import Any

from neural_layers.errors import require

_HOME = {
    "export_onnx": "export",
    "compare_exports": "compare",
    "VerificationError": "verify",
    "Check": "verify",
    "OnnxModel": "onnx_model",
    "OnnxTranslator": "translator",
    "OnnxState": "session",
}

__all__ = ["Check", "OnnxModel", "OnnxState", "OnnxTranslator", "VerificationError", "compare_exports", "export_onnx"]


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    # Exporting needs torch, transformers and onnx; serving needs none of them.
    require(*["onnx"] * (_HOME[name] in ("export", "verify", "compare")), "onnxruntime", extra="onnx")
    return getattr(import_module(f"neural_layers.models.export.{_HOME[name]}"), name)
