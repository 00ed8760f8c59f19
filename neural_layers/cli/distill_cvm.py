"""`neural-layers distill cvm`: teach a translator, distil a smaller one from it, report what was kept."""

import argparse
from pathlib import Path
from typing import Any

DEGRADED = 3  # the exit status where the student keeps too little of its teacher's quality


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
    _add_gate(parser)
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
        "--compress", metavar="NAMES", help="forms of the student to measure: bf16, nf4, onnx, onnx-int8, onnx-int4"
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
    group.add_argument("--precision", default="auto", metavar="NAME", help="auto (default), float32, bf16 or fp16")
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
    group.add_argument(
        "--report-to", default="tensorboard", metavar="NAMES", help="tensorboard (default), wandb, mlflow, none"
    )
    group.add_argument("--statistics", type=int, metavar="N", help="log norms of gradients and weights every N steps")
    group.add_argument("--seed", type=int, default=0, metavar="N")
    group.add_argument("--threads", type=int, metavar="N", help="of the CPU; the same bits need the same number")


def _add_gate(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("quality gate")
    group.add_argument("--metric", default="bleu", metavar="NAME", help="bleu (default) or chrf")
    group.add_argument(
        "--max-drop", type=float, default=0.05, metavar="X", help="a larger fall goes back; default: 0.05"
    )
    group.add_argument("--gate-patience", type=int, default=3, metavar="N", help="times to go back; default: 3")
    group.add_argument("--lr-factor", type=float, default=0.5, metavar="X", help="of the rate each time; default: 0.5")
    group.add_argument("--min-retention", type=float, default=0.9, metavar="X", help="of the teacher's; default: 0.9")
    group.add_argument("--confidence", type=float, default=0.95, metavar="X", help="of the intervals; default: 0.95")
    group.add_argument("--samples", type=int, default=1000, metavar="N", help="of the bootstrap; default: 1000")


def run_cvm(options: argparse.Namespace) -> int:
    """Run the recipe, print the table and the report's path; 3 where the student keeps too little."""
    from neural_layers.errors import InputError, require

    require("transformers", "accelerate", "sacrebleu", "tqdm", "matplotlib", extra="train")
    import torch
    from transformers.utils import logging

    from neural_layers.distill.recipes.cvm import distill_cvm
    from neural_layers.distill.recipes.cvm_options import CVMOptions
    from neural_layers.distill.recipes.table import print_table

    logging.disable_progress_bar()  # of loading and saving; training has its own
    if options.threads is not None:
        if options.threads < 1:
            raise InputError(f"--threads {options.threads} must be at least 1")
        torch.set_num_threads(options.threads)
    fields = {name: value for name, value in vars(options).items() if name in CVMOptions.__dataclass_fields__}
    report = distill_cvm(CVMOptions(**fields), command=options.command_line)
    print_table(report)
    print(f"report: {options.out / 'report.html'}")
    return 0 if report["gate"]["passed"] else DEGRADED
