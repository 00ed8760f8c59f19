"""Adapters of language models on disk: put into the weights, and described."""

import shutil
from pathlib import Path
from typing import Any

from neural_layers.distill.checkpoint import save_model
from neural_layers.distill.files import replacing
from neural_layers.distill.recipes.adapt_options import SCHEMES, quantized
from neural_layers.errors import InputError
from neural_layers.models.loading import check_model_folder, load_language_model, load_model
from neural_layers.wrappers.lora import LoRAConfig, MergeReport, apply_lora, fold_lora, load_adapter
from neural_layers.wrappers.lora.peft_files import read_adapter
from neural_layers.wrappers.lora.report import CoverageReport

_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "chat_template.jinja")


def merge_adapter(
    model_folder: Path,
    adapter: Path,
    out: Path,
    *,
    scheme: str | None = None,
    double_quant: bool = False,
    weight: float = 1.0,
    untie: bool = False,
) -> MergeReport:
    """Write the model with W + weight · ΔW for its weights to `out`, a new folder, with its tokenizer.

    scheme, double_quant: what the model is quantized by first, or None. untie: as in `merge_lora`.
    Raises InputError for folders that are no model and no adapter of it, an `out` that is not empty, and a scheme or
    weight that cannot be.
    """
    if scheme not in (None, *SCHEMES):
        raise InputError(f"--quantize {scheme} must be one of {', '.join(SCHEMES)}")
    if double_quant and scheme not in ("nf4", "fp4"):
        raise InputError("--double-quant is for --quantize nf4 and fp4; leave it out, or give one of them")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} exists and nothing in it is overwritten; give another --out or remove it")
    read_adapter(adapter)
    model, _ = load_language_model(model_folder)
    if scheme is not None:
        quantized(model, scheme, double_quant)
    load_adapter(model, adapter)
    report = fold_lora(model, {"default": weight}, untie=untie)
    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as beside:
        save_model(beside, model)
        for name in _TOKENIZER:
            if (model_folder / name).is_file():
                shutil.copy2(model_folder / name, beside / name)
    return report


def describe_adapter(folder: Path) -> str:
    """The modules of an adapter, their ranks and what it says of itself, a line for each kind."""
    config, tensors = read_adapter(folder)
    groups: dict[tuple[Any, ...], list[int]] = {}
    for key, tensor in tensors.items():
        name = key.removeprefix("base_model.model.")
        plain = ".".join("*" if part.isdigit() else part for part in name.split("."))
        groups.setdefault((plain, tuple(tensor.shape), tensor.dtype), []).append(tensor.numel())
    width = max(len(key[0]) for key in groups)
    lines = [
        f"{name.ljust(width)}  {len(sizes):3} × {list(shape)} {str(dtype).removeprefix('torch.')}"
        for (name, shape, dtype), sizes in groups.items()
    ]
    told = {name: config.get(name) for name in ("r", "lora_alpha", "lora_dropout", "use_rslora", "use_dora")}
    lines.append(", ".join(f"{name}={value}" for name, value in told.items()))
    count, size = (sum(t.numel() for t in tensors.values()), sum(t.nbytes for t in tensors.values()))
    lines.append(f"{count:,} parameters, {size:,} bytes, base: {config.get('base_model_name_or_path')}")
    return "\n".join(lines)


def describe_coverage(folder: Path, config: LoRAConfig) -> CoverageReport:
    """What an adapter of this config would cover of the model in `folder`. Raises InputError where it cannot be."""
    check_model_folder(folder)
    return apply_lora(load_model(folder), config)
