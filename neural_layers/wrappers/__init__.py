"""Wrappers that make any `nn.Module` cheaper to train and smaller to ship, without a line changed in a model file.

`lora` (low-rank adapters), `quantization` and `pruning`; each loads when one of its names is first used.
"""

import importlib
from typing import Any

_NAMES = {
    "lora": (
        "CoverageReport",
        "LoRAConfig",
        "LoRAConv1d",
        "LoRAEmbedding",
        "LoRALinear",
        "MergeReport",
        "adapter_rows",
        "apply_lora",
        "disable_adapters",
        "fold_lora",
        "load_adapter",
        "merge_lora",
        "remove_adapter",
        "save_adapter",
        "set_adapter",
        "unmerge_lora",
    ),
    "pruning": (
        "PruningReport",
        "PruningSchedule",
        "ShrinkPlan",
        "ShrinkReport",
        "apply_masks",
        "load_masks",
        "measured_scores",
        "plan_shrink",
        "prune",
        "restore_masks",
        "save_masks",
        "shrink",
        "sparsity",
        "unprune",
    ),
    "quantization": (
        "Plan",
        "Progressive",
        "QuantizationReport",
        "SizeTable",
        "compare_sizes",
        "convert_qat",
        "load_quantized",
        "progressive_quantize",
        "quantize",
        "save_quantized",
    ),
}
_PACKAGE = {name: package for package, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> Any:
    if name not in _PACKAGE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_PACKAGE[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_PACKAGE])
