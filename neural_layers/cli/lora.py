"""`neural-layers lora`: a trained language model adapted to another text by a few numbers beside its weights."""

import argparse
from pathlib import Path
from typing import Any

from neural_layers.cli.train import add_data, add_training

_SCHEMES = "nf4, fp4, int4 or int8_dynamic"


def add(subcommands: Any) -> None:
    """Declare `lora train`, `lora merge` and `lora inspect`."""
    parser = subcommands.add_parser(
        "lora",
        help="adapters of a language model: train, merge, inspect",
        description="Low-rank adapters (LoRA; over quantized weights QLoRA), in the files of PEFT.",
    )
    actions = parser.add_subparsers(required=True, metavar="ACTION")
    _add_train(actions)
    _add_merge(actions)
    _add_inspect(actions)


def _add_train(actions: Any) -> None:
    parser = actions.add_parser(
        "train",
        help="train an adapter on text",
        description="Train an adapter of a hybrid language model, whose own weights stay as they are. Writes "
        "OUT/adapter (adapter_model.safetensors and adapter_config.json, as PEFT), OUT/report.json and the figures of "
        "the training. The same command on the same --out continues a run that was interrupted, to the same bits.",
    )
    parser.add_argument("model", type=Path, metavar="MODEL", help="a folder with a model, such as RUN/model")
    add_data(parser)
    group = parser.add_argument_group("adapter")
    _add_adapter(group)
    group.add_argument("--dropout", dest="lora_dropout", type=float, default=0.0, metavar="P", help="of its inputs")
    _add_quantize(group, "freeze the weights in fewer bits (QLoRA)")
    group.add_argument(
        "--no-checkpointing",
        dest="checkpointing",
        action="store_false",
        help="keep all activations for the backward pass: faster, and more memory",
    )
    add_training(parser, lr=2e-3, weight_decay=0.0)
    parser.set_defaults(run=run_train)


def _add_adapter(group: Any) -> None:
    group.add_argument("--r", type=int, default=8, metavar="N", help="rank; default: 8")
    group.add_argument("--alpha", type=float, default=16, metavar="X", help="the scale is alpha / r; default: 16")
    group.add_argument(
        "--targets",
        default="all-linear",
        metavar="NAMES",
        help="modules with commas between, such as q_proj,in_proj,conv1d; default: all-linear, all but the head",
    )
    group.add_argument("--layers", dest="lora_layers", metavar="I,J", help="indices of layers; default: all")
    group.add_argument(
        "--rank", dest="ranks", action="append", default=[], metavar="NAME=R", help="another rank for these modules"
    )
    group.add_argument("--dora", action="store_true", help="train the magnitude of each output too (DoRA)")
    group.add_argument("--rslora", action="store_true", help="scale by alpha / √r (rsLoRA)")


def _add_quantize(group: Any, what: str) -> None:
    group.add_argument("--quantize", metavar="SCHEME", help=f"{what}: {_SCHEMES}")
    group.add_argument("--double-quant", action="store_true", help="quantize the scales of nf4 and fp4 too")


def _add_merge(actions: Any) -> None:
    parser = actions.add_parser(
        "merge",
        help="write a model with an adapter in its weights",
        description="Write a model folder whose weights are W + ΔW. With --quantize the weights are quantized first, "
        "as they were in the training of the adapter, and again after the merge.",
    )
    parser.add_argument("model", type=Path, metavar="MODEL", help="the model that the adapter was trained on")
    parser.add_argument("adapter", type=Path, metavar="ADAPTER", help="a folder with PEFT's files, such as RUN/adapter")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="a new folder")
    parser.add_argument("--weight", type=float, default=1.0, metavar="X", help="of the adapter; default: 1")
    parser.add_argument("--untie", action="store_true", help="part a head and an embedding that share their weight")
    _add_quantize(parser, "quantize the model")
    parser.set_defaults(run=run_merge)


def _add_inspect(actions: Any) -> None:
    parser = actions.add_parser(
        "inspect",
        help="what an adapter holds, or what one would cover",
        description="Of an adapter's folder: its modules, ranks and size. Of a model's folder: what an adapter of "
        "these options would cover, and what share of the parameters that is.",
    )
    parser.add_argument("folder", type=Path, metavar="FOLDER", help="an adapter, or a model")
    _add_adapter(parser.add_argument_group("adapter"))
    parser.set_defaults(run=run_inspect)


def _prepare() -> None:
    from transformers.utils import logging

    from neural_layers.errors import require

    require("transformers", "accelerate", "tqdm", "rich", extra="train")
    logging.disable_progress_bar()


def run_train(options: argparse.Namespace) -> int:
    """Train, print the table and the paths."""
    _prepare()
    import torch

    from neural_layers.distill.recipes.adapt import train_adapter
    from neural_layers.distill.recipes.adapt_options import AdaptOptions
    from neural_layers.distill.recipes.adapt_table import print_adapter
    from neural_layers.errors import InputError

    if options.threads is not None:
        if options.threads < 1:
            raise InputError(f"--threads {options.threads} must be at least 1")
        torch.set_num_threads(options.threads)
    fields = {name: value for name, value in vars(options).items() if name in AdaptOptions.__dataclass_fields__}
    fields.update(data=tuple(options.data), ranks=tuple(options.ranks))
    report = train_adapter(AdaptOptions(**fields), command=options.command_line)
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        print_adapter(report)
    return 0


def run_merge(options: argparse.Namespace) -> int:
    """Merge, write the folder, print how exact it is."""
    _prepare()
    from neural_layers.distill.recipes.adapt_merging import merge_adapter

    print(
        merge_adapter(
            options.model,
            options.adapter,
            options.out,
            scheme=options.quantize,
            double_quant=options.double_quant,
            weight=options.weight,
            untie=options.untie,
        )
    )
    print(f"model: {options.out}")
    return 0


def _refuse_given(options: argparse.Namespace) -> None:
    """Raise InputError for an option of an adapter that would do nothing, because the adapter is there."""
    from neural_layers.errors import InputError

    group = argparse.ArgumentParser()
    _add_adapter(group)
    plain = vars(group.parse_args([]))
    given = [name for name in plain if getattr(options, name) != plain[name]]
    if given:
        flag = next(action.option_strings[0] for action in group._actions if action.dest == given[0])
        raise InputError(f"{flag} is for a model's folder; {options.folder} holds an adapter, which says it itself")


def run_inspect(options: argparse.Namespace) -> int:
    """Print the table of an adapter or of what one would cover."""
    _prepare()
    from neural_layers.distill.recipes.adapt_merging import describe_adapter, describe_coverage
    from neural_layers.distill.recipes.adapt_options import lora_config
    from neural_layers.wrappers.lora.peft_files import CONFIG

    if (options.folder / CONFIG).is_file():
        _refuse_given(options)
        print(describe_adapter(options.folder))
    else:
        print(describe_coverage(options.folder, lora_config(options)))
    return 0
