"""`neural-layers distill lm`: a small language model out of a large one."""

import argparse
from pathlib import Path
from typing import Any

from neural_layers.cli.distill_shared import add_gate, add_running, chosen, conclude, prepare
from neural_layers.cli.train import unescaped


def add(recipes: Any) -> None:
    """Declare the recipe."""
    parser = recipes.add_parser(
        "lm",
        help="a causal language model",
        description="Distil a hybrid language model from a teacher: a hybrid, or any causal language model of "
        "transformers in a local folder. The same command on the same --out continues a run that was interrupted, to "
        "the same bits. Exits with 3 where the student keeps less than --min-retention of the teacher's bits per byte "
        "or loss.",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the run's folder, or one to continue")
    parser.add_argument("--teacher", type=Path, required=True, metavar="DIR", help="a model with its tokenizer")
    _add_data(parser)
    _add_student(parser)
    _add_training(parser)
    _add_loss(parser)
    add_gate(parser, "loss")
    parser.set_defaults(run=run_lm)


def _add_data(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data",
        action="append",
        required=True,
        metavar="SOURCE[=WEIGHT]",
        help="as for neural-layers train: files, folders, patterns, hf:NAME; repeat it to mix several by weight",
    )
    group.add_argument("--valid", metavar="SOURCE", help="text to validate on; default: the valid files of a folder")
    group.add_argument("--valid-fraction", type=float, metavar="X", help="hold out this share of each source instead")
    group.add_argument("--test", metavar="SOURCE", help="text that the report judges by; default: the validation text")
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


def _add_student(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("student")
    group.add_argument(
        "--student", type=Path, metavar="DIR", help="a hybrid to begin with; its tokenizer the teacher's"
    )
    group.add_argument(
        "--preset", default="tiny", metavar="NAME", help="of a new one: tiny (default), slm-20m, slm-130m"
    )
    group.add_argument("--mixers", default="hybrid", metavar="NAME", help="as for neural-layers train; default: hybrid")
    for name in ("layers", "width", "heads", "kv-heads", "ff"):
        group.add_argument(f"--{name}", type=int, metavar="N", help="instead of the preset's")
    group.add_argument("--max-context", type=int, metavar="N", help="that the model takes in use; default: --context")
    group.add_argument("--dropout", type=float, default=0.0, metavar="P")
    group.add_argument("--baseline", action="store_true", help="also train the student without the teacher")
    group.add_argument(
        "--compress",
        metavar="NAMES",
        help="forms to measure: bf16, int8, int4, nf4, onnx, onnx-int8, onnx-int4",
    )


def _add_training(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training")
    group.add_argument("--resume", action="store_true", help="insist that there is a run to continue")
    group.add_argument("--steps", type=int, default=2000, metavar="N", help="default: 2000")
    group.add_argument("--batch", type=int, default=12, metavar="N", help="sequences of a forward pass; default: 12")
    group.add_argument("--accumulate", type=int, default=1, metavar="N", help="forward passes of a step; default: 1")
    group.add_argument("--lr", type=float, metavar="X", help="default: 1e-4 for given weights, 0.001 for new")
    group.add_argument("--min-lr", type=float, metavar="X", help="where the cosine ends; default: a tenth of --lr")
    group.add_argument("--warmup", type=int, metavar="N", help="steps; default: a tenth of --steps, at most 100")
    group.add_argument("--schedule", default="cosine", metavar="NAME", help="cosine (default), linear or constant")
    group.add_argument("--weight-decay", type=float, default=0.1, metavar="X", help="of matrices; default: 0.1")
    group.add_argument("--beta2", type=float, default=0.99, metavar="X", help="of AdamW; default: 0.99")
    group.add_argument("--clip", type=float, default=1.0, metavar="X", help="norm of the gradient; 0: none; default: 1")
    group.add_argument("--eval-steps", type=int, default=250, metavar="N", help="between validations; default: 250")
    group.add_argument("--save-steps", type=int, metavar="N", help="between checkpoints; default: as --eval-steps")
    group.add_argument("--keep", type=int, default=2, metavar="N", help="checkpoints that stay; default: 2")
    group.add_argument("--patience", type=int, metavar="N", help="stop after N validations without a better loss")
    add_running(group)


def _add_loss(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("loss: alpha · (T² · divergence + cosine) + beta · cross-entropy")
    group.add_argument("--temperature", default="2", metavar="X[:Y]", help="default: 2; X:Y is a schedule")
    for name in ("alpha", "beta"):
        group.add_argument(f"--{name}", default="0.5", metavar="X[:Y]", help="default: 0.5; X:Y is a schedule")
    group.add_argument("--divergence", default="forward", metavar="NAME", help="forward (default), reverse or jsd")
    group.add_argument("--cosine", type=float, default=0.0, metavar="X", help="of the hidden states; default: 0")
    group.add_argument("--states", default="last", metavar="NAME", help="layers of --cosine: last (default), uniform")
    group.add_argument("--label-smoothing", type=float, default=0.0, metavar="X")
    group.add_argument("--teacher-cache", type=Path, metavar="DIR", help="keep the teacher's largest logits here")
    group.add_argument("--top-k", type=int, default=64, metavar="K", help="of --teacher-cache; default: 64")


def run_lm(options: argparse.Namespace) -> int:
    """Run the recipe, print the table and the report's path; 3 where the student keeps too little."""
    prepare(options)
    from neural_layers.distill.recipes.distill_lm import distill_language_model
    from neural_layers.distill.recipes.distill_lm_options import DistillLMOptions

    return conclude(distill_language_model(chosen(options, DistillLMOptions), command=options.command_line), options)
