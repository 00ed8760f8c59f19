"""Quantization of any model: `quantize`, plans, saved folders, and what bits cost and save."""

import importlib
from typing import Any

from neural_layers.wrappers.quantization.plan import Plan
from neural_layers.wrappers.quantization.quantize import convert_qat, quantize
from neural_layers.wrappers.quantization.report import LayerReport, QuantizationReport

_LATER = {
    "Progressive": "progressive",
    "SizeTable": "sizes",
    "compare_sizes": "sizes",
    "load_quantized": "saving",
    "progressive_quantize": "progressive",
    "save_quantized": "saving",
}

__all__ = ["LayerReport", "Plan", "QuantizationReport", "convert_qat", "quantize", *_LATER]


def __getattr__(name: str) -> Any:
    if name not in _LATER:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_LATER[name]}"), name)
