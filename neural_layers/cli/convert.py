"""`neural-layers convert`: a model of transformers as a hybrid model, with Mamba-2 for some of its attention layers."""

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

DTYPES = ("float32", "float64", "bfloat16", "float16")
TOLERANCE = 2e-5  # of the logits, of the largest one where that is above 1


def add(subcommands: Any) -> None:
    """Declare `convert`."""
    parser = subcommands.add_parser(
        "convert",
        help="turn a Llama, Mistral, Qwen or Mamba checkpoint into a hybrid model",
        description="Load the weights of a transformers model (llama, mistral, qwen2, qwen3, mamba, mamba2) into a "
        "hybrid model with the same logits, and turn chosen attention layers into Mamba-2 layers that begin near what "
        "the attention gave, ready to be distilled. Hybrid models can be converted on.",
    )
    parser.add_argument("model", type=Path, metavar="MODEL_DIR", help="a folder with config.json and safetensors")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the new folder, new or empty")
    parser.add_argument(
        "--replace-layers",
        metavar="LAYERS",
        help="layers whose attention becomes a Mamba-2 mixer, counted from 0, as in 1,3,5; every:2 is every second "
        "attention layer, beginning with the second; default: none",
    )
    parser.add_argument("--mixer", default="mamba2", metavar="NAME", help="what takes their place; default: mamba2")
    parser.add_argument(
        "--calibration-steps",
        type=int,
        default=200,
        metavar="N",
        help="of fitting each new mixer to the attention it replaces, on text that the model writes; default: 200",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of that text; default: 0")
    parser.add_argument("--dtype", choices=DTYPES, help="of the weights; default: as in the checkpoint")
    parser.add_argument(
        "--check", action="store_true", help="first compare the logits with those of transformers, on random tokens"
    )
    parser.set_defaults(run=run_convert)


def run_convert(options: argparse.Namespace) -> int:
    """Load, check, replace, save, print what became of what."""
    from neural_layers.errors import InputError, require

    require("transformers", extra="models")
    import torch
    from transformers.utils import logging

    from neural_layers.models.conversion.loading import from_transformers
    from neural_layers.models.conversion.replacing import convert_to_hybrid

    logging.disable_progress_bar()
    if options.out.exists() and (not options.out.is_dir() or any(options.out.iterdir())):
        raise InputError(f"{options.out} exists and is not an empty folder; give a new one to --out")
    if options.calibration_steps < 0:
        raise InputError(f"--calibration-steps {options.calibration_steps} must not be negative")
    if options.check and not _check(options.model):
        return 1
    print(f"loading {options.model}", flush=True)
    original = from_transformers(options.model, dtype=options.dtype and getattr(torch, options.dtype))
    model = original
    if options.replace_layers is not None:
        layers = chosen_layers(options.replace_layers, original.config.mixers or [])
        if options.calibration_steps:
            print(f"fitting {len(layers)} layers to text that the model writes", flush=True)
        model = convert_to_hybrid(
            original,
            layers,
            options.mixer,
            calibration_steps=options.calibration_steps,
            seed=options.seed,
            tell=_tell,
        )
    companions = _save(model, options.model, options.out)
    _print_table(original, model, companions)
    print(options.out)
    return 0


def chosen_layers(given: str, mixers: list[str]) -> list[int]:
    """The layers that `1,3,5` or `every:2` name. Raises InputError for what is neither."""
    from neural_layers.errors import InputError

    every, _, step = given.partition(":")
    if every == "every":
        if not step.isdecimal() or int(step) < 1:
            raise InputError(f"--replace-layers {given} needs a positive number, as in every:2")
        attention = [i for i, name in enumerate(mixers) if name.endswith("attention")]
        layers = attention[int(step) - 1 :: int(step)]
        if not layers:
            raise InputError(f"--replace-layers {given} names no layer: the model has {len(attention)} with attention")
        return layers
    try:
        return [int(layer) for layer in given.split(",")]
    except ValueError as error:
        raise InputError(f"--replace-layers {given} must be numbers, as in 1,3,5, or every:2") from error


def _check(folder: Path) -> bool:
    """Compare with transformers; whether the logits are the same."""
    from neural_layers.models.conversion.folder import CHECKED_LENGTH, CHECKED_ROWS, logit_difference

    difference, largest = logit_difference(folder)
    is_same = difference <= TOLERANCE * max(1.0, largest)
    print(
        f"largest logit difference from transformers: {difference:.1e} (largest logit {largest:.1f}, float32, random "
        f"tokens, {CHECKED_ROWS} × up to {CHECKED_LENGTH})",
        flush=True,
    )
    if not is_same:
        print(f"that is more than {TOLERANCE:.0e} of the largest logit: nothing was written")
    return is_same


def _tell(layer: int, before: float, after: float) -> None:
    print(f"layer {layer}: relative squared error of the mixer {before:.3f}, fitted {after:.3f}", flush=True)


def _save(model: Any, source: Path, out: Path) -> list[str]:
    """Write the folder beside and rename it; the names of the files that were copied as they are."""
    from neural_layers.distill.files import replacing
    from neural_layers.models.conversion.folder import copy_companions

    out.parent.mkdir(parents=True, exist_ok=True)
    with replacing(out) as beside:
        beside.mkdir()
        if (source / "generation_config.json").is_file():
            # Copied as it is: some defaults that such a file can hold cannot be saved anew.
            model.generation_config = type(model.generation_config)()
        model.save_pretrained(beside)
        return copy_companions(source, beside)


def _print_table(original: Any, model: Any, companions: list[str]) -> None:
    before, after = (Counter(each.config.mixers) for each in (original, model))
    print(f"{'':>14} {'before':>14} {'after':>14}")
    for name in sorted(before | after):
        print(f"{name:>14} {before[name]:>14} {after[name]:>14}")
    print(f"{'parameters':>14} {original.num_parameters():>14,} {model.num_parameters():>14,}")
    kept = [name for name, tensor in model.state_dict().items() if _is_same(original.state_dict().get(name), tensor)]
    print(f"{'tensors kept':>14} {'':>14} {len(kept):>14}")
    print(f"{'dtype':>14} {'':>14} {str(model.dtype).removeprefix('torch.'):>14}")
    replaced = sum(a != b for a, b in zip(original.config.mixers, model.config.mixers, strict=True))
    if replaced:
        print(f"carried in the {replaced} replaced: q → C, k → B, v → x, o → out")
    print("copied: " + (", ".join(companions) or "no tokenizer and no generation defaults were there"))


def _is_same(old: Any, new: Any) -> bool:
    return old is not None and old.shape == new.shape and bool((old == new).all())
