"""Low-rank adapters (arXiv 2106.09685) around any linear layer, embedding or Conv1d; over quantized layers it is QLoRA
(arXiv 2305.14314). They are saved in PEFT's files and loaded from them."""

from neural_layers.wrappers.lora.apply import adapter_names, apply_lora, remove_adapter
from neural_layers.wrappers.lora.config import LoRAConfig
from neural_layers.wrappers.lora.conv import LoRAConv1d
from neural_layers.wrappers.lora.embedding import LoRAEmbedding
from neural_layers.wrappers.lora.linear import LoRALinear
from neural_layers.wrappers.lora.merge import MergeReport, fold_lora, merge_lora, unmerge_lora
from neural_layers.wrappers.lora.peft_files import load_adapter, save_adapter
from neural_layers.wrappers.lora.report import CoverageReport
from neural_layers.wrappers.lora.switching import adapter_rows, disable_adapters, set_adapter

__all__ = [
    "CoverageReport",
    "LoRAConfig",
    "LoRAConv1d",
    "LoRAEmbedding",
    "LoRALinear",
    "MergeReport",
    "adapter_names",
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
]
