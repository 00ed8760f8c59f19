"""`neural-layers distill cvm`: teach a translator, distil a smaller one from it, report what was kept."""

import argparse
from pathlib import Path
from typing import Any

from neural_layers.cli.distill_shared import add_gate, add_running, chosen, conclude, prepare


def add(recipes: Any) -> None:
    """Declare the recipe."""
    parser = recipes.add_parser(
        "cvm",
        help="an encoder-decoder translator",
        description="Train a translator (or take one with --teacher), distil a smaller one from it, write a report. "
        "The same command on the same --out continues a run that was interrupted. Exits with 3 where the student "
        "keeps less than --min-retention of the teacher's BLEU or chrF.",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the run's folder, or one to continue")
    parser.add_argument("--resume", action="store_true", help="insist that there is a run to continue")
    _add_data(parser)
    _add_models(parser)
    _add_training(parser)
    add_gate(parser, "bleu", "chrf")
    parser.set_defaults(run=run_cvm)


def _add_data(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data")
    group.add_argument(
        "--data", type=Path, metavar="FILE", help="source<TAB>target lines, .tsv or .tsv.gz; default: embedded corpus"
    )
    group.add_argument("--valid", type=Path, metavar="FILE", help="pairs to choose the best weights by")
    group.add_argument("--test", type=Path, metavar="FILE", help="pairs that the report judges by")
    group.add_argument(
        "--target-language", dest="language", metavar="CODE", help="needed for zh, ja, th …: text without spaces"
    )


def _add_models(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("models")
    group.add_argument("--preset", default="tiny", metavar="NAME", help="tiny (default), small or paper")
    group.add_argument("--teacher", type=Path, metavar="DIR", help="a trained teacher with its tokenizer")
    group.add_argument("--tokenizer", type=Path, metavar="DIR", help="a tokenizer, instead of training one on the data")
    for name in ("layers", "width", "heads", "ff"):
        group.add_argument(f"--student-{name}", type=int, metavar="N", help="of the student, instead of the preset's")
    group.add_argument("--baseline", action="store_true", help="also train the student without the teacher")
    group.add_argument(
        "--compress",
        metavar="NAMES",
        help="forms to measure: bf16, int8, int4, nf4, onnx, onnx-int8, onnx-int4",
    )


def _add_training(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training (what is left out comes from the preset)")
    group.add_argument(
        "--num-iterations", "--steps", dest="steps", type=int, metavar="N", help="the student's training steps"
    )
    group.add_argument("--teacher-steps", type=int, metavar="N", help="the teacher's; default: as --num-iterations")
    group.add_argument("--batch", type=int, metavar="N", help="pairs of a step of the student")
    group.add_argument("--lr", type=float, metavar="X", help="the student's learning rate")
    group.add_argument("--warmup", type=int, metavar="N", help="the student's steps of warmup")
    for name in ("temperature", "alpha", "beta"):
        group.add_argument(f"--{name}", metavar="X[:Y]", help="of the loss; X:Y is a schedule, X:Y:cosine another")
    group.add_argument("--divergence", default="forward", metavar="NAME", help="forward (default), reverse or jsd")
    group.add_argument("--label-smoothing", type=float, default=0.0, metavar="X", help="of the student; default: 0")
    group.add_argument("--cosine", type=float, default=0.0, metavar="X", help="of the last states; default: 0")
    group.add_argument("--mse", type=float, default=0.0, metavar="X", help="of the logits; default: 0")
    group.add_argument(
        "--teacher-cache", type=Path, metavar="DIR", help="keep the teacher's largest logits there, and train from them"
    )
    group.add_argument("--top-k", type=int, default=64, metavar="K", help="logits in the cache; default: 64")
    group.add_argument("--eval-steps", type=int, metavar="N", help="between validations")
    group.add_argument("--save-steps", type=int, metavar="N", help="between checkpoints; default: as --eval-steps")
    group.add_argument("--eval-sentences", type=int, metavar="N", help="of the validation pairs that are translated")
    group.add_argument("--bertscore", type=Path, metavar="DIR", help="an encoder, for BERTScore beside the others")
    group.add_argument("--bertscore-layers", type=int, metavar="N", help="of the encoder; default: all")
    add_running(group)


def run_cvm(options: argparse.Namespace) -> int:
    """Run the recipe, print the table and the report's path; 3 where the student keeps too little."""
    prepare(options, "sacrebleu")
    from neural_layers.distill.recipes.cvm import distill_cvm
    from neural_layers.distill.recipes.cvm_options import CVMOptions

    return conclude(distill_cvm(chosen(options, CVMOptions), command=options.command_line), options)
