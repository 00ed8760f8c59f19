"""`neural-layers train`: a language model from whatever text there is, from scratch or from a trained one."""

import argparse
from pathlib import Path
from typing import Any


def add(subcommands: Any) -> None:
    """Declare `train`."""
    parser = subcommands.add_parser(
        "train",
        help="train a language model on text",
        description="Train a hybrid language model, or go on from one with --model. The same command on the same --out "
        "continues a run that was interrupted, to the same bits. Run it by torchrun for several processes.",
    )
    add_data(parser)
    _add_model(parser)
    add_training(parser)
    parser.set_defaults(run=run_train)


def add_data(parser: argparse.ArgumentParser) -> None:
    """Declare what text is read, and how."""
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data",
        action="append",
        required=True,
        metavar="SOURCE[=WEIGHT]",
        help="a file (.txt, .json, .jsonl, .parquet, each also .gz), a folder, a pattern, or hf:NAME[:CONFIG[:SPLIT]]; "
        "repeat it to mix several by weight",
    )
    group.add_argument("--valid", metavar="SOURCE", help="text to validate on; default: the valid files of a folder")
    group.add_argument("--valid-fraction", type=float, metavar="X", help="hold out this share of each source instead")
    group.add_argument("--tokenizer", metavar="NAME", help="char (default), bpe:VOCABULARY, or a tokenizer's folder")
    group.add_argument("--text-field", default="text", metavar="NAME", help="the field of a row; default: text")
    group.add_argument(
        "--document-separator",
        metavar="TEXT",
        type=unescaped,
        help=r"what divides .txt files into documents (\n, \t and \\ are understood); default: a file is a document",
    )
    group.add_argument("--streaming", action="store_true", help="never hold the training data or its tokens")
    group.add_argument("--cache", type=Path, metavar="DIR", help="of tokens; default: ~/.cache/neural_layers/tokens")
    group.add_argument("--context", type=int, default=256, metavar="N", help="tokens of a sequence; default: 256")


def _add_model(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("model")
    group.add_argument("--model", type=Path, metavar="DIR", help="go on from this model instead of a new one")
    group.add_argument("--preset", default="tiny", metavar="NAME", help="tiny (default), slm-20m or slm-130m")
    group.add_argument(
        "--mixers",
        default="hybrid",
        metavar="NAME",
        help="hybrid (default), samba, mamba, mamba2, attention, sliding_attention, or one a layer with commas",
    )
    for name in ("layers", "width", "heads", "kv-heads", "ff"):
        group.add_argument(f"--{name}", type=int, metavar="N", help="instead of the preset's")
    group.add_argument("--max-context", type=int, metavar="N", help="that the model takes in use; default: --context")
    group.add_argument("--dropout", type=float, default=0.0, metavar="P")


def add_training(parser: argparse.ArgumentParser, *, lr: float = 1e-3, weight_decay: float = 0.1) -> None:
    """Declare how long and how the training goes, with these defaults."""
    group = parser.add_argument_group("training")
    group.add_argument(
        "--out", type=Path, required=True, metavar="DIR", help="the run's folder, or the one to continue"
    )
    group.add_argument("--resume", action="store_true", help="insist that there is a run to continue")
    group.add_argument("--steps", type=int, default=2000, metavar="N", help="default: 2000")
    group.add_argument("--batch", type=int, default=12, metavar="N", help="sequences of a forward pass; default: 12")
    group.add_argument("--accumulate", type=int, default=1, metavar="N", help="forward passes of a step; default: 1")
    group.add_argument("--lr", type=float, default=lr, metavar="X", help=f"default: {lr:g}")
    group.add_argument("--min-lr", type=float, metavar="X", help="where the cosine ends; default: a tenth of --lr")
    group.add_argument("--warmup", type=int, metavar="N", help="steps; default: a tenth of --steps, at most 100")
    group.add_argument("--schedule", default="cosine", metavar="NAME", help="cosine (default), linear or constant")
    group.add_argument(
        "--weight-decay", type=float, default=weight_decay, metavar="X", help=f"of matrices; default: {weight_decay:g}"
    )
    group.add_argument("--beta2", type=float, default=0.99, metavar="X", help="of AdamW; default: 0.99")
    group.add_argument("--clip", type=float, default=1.0, metavar="X", help="norm of the gradient; 0: none; default: 1")
    group.add_argument("--label-smoothing", type=float, default=0.0, metavar="X")
    group.add_argument("--bf16", action="store_true", help="autocast to bfloat16")
    group.add_argument("--fsdp", action="store_true", help="split the model over the processes of torchrun (FSDP2)")
    group.add_argument("--patience", type=int, metavar="N", help="stop after N validations without a better loss")
    group.add_argument("--eval-steps", type=int, default=250, metavar="N", help="between validations; default: 250")
    group.add_argument("--save-steps", type=int, default=250, metavar="N", help="between checkpoints; default: 250")
    group.add_argument("--keep", type=int, default=2, metavar="N", help="checkpoints that stay; default: 2")
    group.add_argument("--seed", type=int, default=0, metavar="N")
    add_tracking(group, default="tensorboard")
    group.add_argument("--threads", type=int, metavar="N", help="of the CPU; the same bits need the same number")


def add_tracking(parser: Any, default: str) -> None:
    """Declare where the figures of a training go."""
    parser.add_argument(
        "--report-to",
        default=default,
        metavar="NAMES",
        help=f"tensorboard, wandb, mlflow, by commas, or none; default: {default}",
    )
    parser.add_argument("--statistics", type=int, metavar="N", help="log norms of gradients and weights every N steps")


def unescaped(text: str) -> str:
    """The text with \\n, \\t and \\\\ read as in a string."""
    return text.replace(r"\\", "\0").replace(r"\n", "\n").replace(r"\t", "\t").replace("\0", "\\")


def run_train(options: argparse.Namespace) -> int:
    """Run the recipe, print the table and the paths."""
    from neural_layers.errors import InputError, require

    require("transformers", "accelerate", "tqdm", extra="train")
    import torch
    from transformers.utils import logging

    from neural_layers.distill.recipes.language_model import train_language_model
    from neural_layers.distill.recipes.language_model_options import LanguageModelOptions
    from neural_layers.distill.recipes.language_model_table import print_training

    logging.disable_progress_bar()  # of loading and saving; training has its own
    if options.threads is not None:
        if options.threads < 1:
            raise InputError(f"--threads {options.threads} must be at least 1")
        torch.set_num_threads(options.threads)
    fields = {name: value for name, value in vars(options).items() if name in LanguageModelOptions.__dataclass_fields__}
    fields["data"] = tuple(options.data)
    report = train_language_model(LanguageModelOptions(**fields), command=options.command_line)
    if not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0:
        print_training(report, options.out)
    return 0
