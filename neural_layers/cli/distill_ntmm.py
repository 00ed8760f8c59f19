"""`neural-layers distill ntmm`: a small text classifier out of a large one."""

import argparse
from pathlib import Path
from typing import Any

from neural_layers.cli.distill_shared import add_gate, add_running, chosen, conclude, prepare


def add(recipes: Any) -> None:
    """Declare the recipe."""
    parser = recipes.add_parser(
        "ntmm",
        help="a text classifier",
        description="Distil a text classifier from a teacher: any transformers sequence classifier in a local folder, "
        "fine-tuned first where asked, or a hybrid trained here. The same command on the same --out continues a run "
        "that was interrupted. Exits with 3 where the student keeps less than --min-retention of the teacher's "
        "accuracy or macro-F1.",
    )
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="the run's folder, or one to continue")
    _add_data(parser)
    _add_teacher(parser)
    _add_student(parser)
    _add_training(parser)
    add_gate(parser, "accuracy", "macro_f1")
    parser.set_defaults(run=run_ntmm)


def _add_data(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("data")
    rows = "rows with a text and a label: .jsonl, .json, .csv, .tsv or .parquet, each also .gz"
    group.add_argument(
        "--data",
        action="append",
        required=True,
        metavar="[NAME=]PATH",
        help=f"a file of {rows}; or a folder with train, valid and test files; repeat it for several datasets",
    )
    for split, purpose in (("valid", "to choose the best weights by"), ("test", "that the report judges by")):
        group.add_argument(f"--{split}", action="append", default=[], metavar="[NAME=]FILE", help=f"texts {purpose}")
    group.add_argument("--labels", type=Path, metavar="FILE", help="JSON with the classes; default: labels.json beside")
    group.add_argument(
        "--label-map",
        dest="label_maps",
        action="append",
        default=[],
        metavar="[NAME=]FILE",
        help='JSON of the run\'s class by the dataset\'s: {"old": "new", "unwanted": null}',
    )
    group.add_argument("--text-field", default="text", metavar="NAME")
    group.add_argument("--label-field", default="label", metavar="NAME")
    group.add_argument("--imbalance", default="none", metavar="HOW", help="none (default), weights or sampling")
    group.add_argument("--augment", action="store_true", help="reword training texts; doses, negations … stay")
    for table in ("synonyms", "abbreviations"):
        group.add_argument(f"--{table}", type=Path, metavar="FILE", help="a table for --augment, JSON")
    group.add_argument("--max-length", type=int, default=128, metavar="N", help="tokens of a text; default: 128")
    group.add_argument(
        "--tokenizer", metavar="NAME", help="bpe:VOCABULARY or a folder; default: the teacher's, else bpe:4096"
    )
    group.add_argument("--lowercase", action="store_true", help="of a tokenizer that is trained here")


def _add_teacher(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("teacher")
    group.add_argument("--teacher", type=Path, metavar="DIR", help="a sequence classifier; default: train a hybrid")
    group.add_argument("--fine-tune-teacher", action="store_true", help="train it first, with a new head where needed")
    group.add_argument("--teacher-mixers", default="mamba,attention", metavar="NAMES", help="of a hybrid, one a layer")
    group.add_argument("--teacher-width", type=int, default=160, metavar="N", help="default: 160")
    group.add_argument("--teacher-ff", type=int, metavar="N", help="default: twice the width")
    group.add_argument("--teacher-heads", type=int, default=4, metavar="N", help="default: 4")
    group.add_argument("--teacher-epochs", type=float, metavar="X", help="default: as --epochs")
    group.add_argument("--teacher-steps", type=int, metavar="N", help="instead of epochs")
    group.add_argument("--teacher-lr", type=float, metavar="X", help="default: 5e-5 for given weights, 0.001 for new")


def _add_student(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("student")
    group.add_argument("--student", type=Path, metavar="DIR", help="a model to begin with; its tokenizer the teacher's")
    group.add_argument("--student-layers", type=int, metavar="N", help="begin with N of the teacher's layers instead")
    group.add_argument("--student-mixers", default="mamba,attention", metavar="NAMES", help="of a hybrid, one a layer")
    group.add_argument("--student-width", type=int, default=48, metavar="N", help="default: 48")
    group.add_argument("--student-ff", type=int, metavar="N", help="default: twice the width")
    group.add_argument("--student-heads", type=int, default=4, metavar="N", help="default: 4")
    group.add_argument(
        "--pooling", default="mean", metavar="NAME", help="of hybrids: mean (default), last, attention, gem"
    )
    group.add_argument("--dropout", type=float, default=0.1, metavar="P", help="of hybrids; default: 0.1")
    group.add_argument("--baseline", action="store_true", help="also train the student without the teacher")
    group.add_argument("--compress", metavar="NAMES", help="forms of the student to measure: bf16, int8, int4, nf4")


def _add_training(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("training")
    group.add_argument("--resume", action="store_true", help="insist that there is a run to continue")
    group.add_argument("--epochs", type=float, default=8.0, metavar="X", help="default: 8")
    group.add_argument("--steps", type=int, metavar="N", help="instead of epochs")
    group.add_argument("--batch", type=int, default=8, metavar="N", help="texts of a forward pass; default: 8")
    group.add_argument("--accumulate", type=int, default=4, metavar="N", help="forward passes of a step; default: 4")
    group.add_argument("--lr", type=float, metavar="X", help="default: 5e-5 for given weights, 0.001 for new")
    group.add_argument(
        "--find-lr", type=int, nargs="?", const=100, metavar="N", help="only test learning rates, N (100) of them"
    )
    group.add_argument("--warmup", type=float, default=0.1, metavar="X", help="share of the steps; default: 0.1")
    group.add_argument("--weight-decay", type=float, default=0.01, metavar="X", help="default: 0.01")
    group.add_argument("--clip", type=float, default=1.0, metavar="X", help="norm of the gradient; default: 1")
    group.add_argument("--temperature", default="3", metavar="X[:Y]", help="default: 3; X:Y is a schedule")
    for name in ("alpha", "beta"):
        group.add_argument(f"--{name}", default="0.5", metavar="X[:Y]", help="default: 0.5; X:Y is a schedule")
    group.add_argument("--cosine", type=float, default=0.1, metavar="X", help="of the hidden states; default: 0.1")
    group.add_argument("--mse", type=float, default=0.0, metavar="X", help="of the logits; default: 0, usual: 0.05")
    group.add_argument("--label-smoothing", type=float, default=0.1, metavar="X", help="default: 0.1")
    group.add_argument("--divergence", default="forward", metavar="NAME", help="forward (default), reverse or jsd")
    group.add_argument("--eval-steps", type=int, metavar="N", help="between validations; default: an epoch")
    group.add_argument(
        "--patience", type=int, default=5, metavar="N", help="validations without a better one; 0: never"
    )
    add_running(group)


def run_ntmm(options: argparse.Namespace) -> int:
    """Run the recipe, print the table and the report's path; 3 where the student keeps too little."""
    prepare(options)
    from neural_layers.distill.recipes.ntmm import distill_ntmm
    from neural_layers.distill.recipes.ntmm_options import NTMMOptions

    own: NTMMOptions = chosen(options, NTMMOptions)
    if own.find_lr is not None:
        return _find_rate(own)
    return conclude(distill_ntmm(own, command=options.command_line), options)


def _find_rate(options: Any) -> int:
    from neural_layers.distill.files import save_json
    from neural_layers.distill.learning_rate.plot import save_curve
    from neural_layers.distill.recipes.ntmm import find_rate

    name, curve = find_rate(options)
    folder = options.out / "learning_rate"
    paths = [save_curve(curve, folder / f"{name}.{kind}") for kind in ("png", "svg")]
    points = {"rates": curve.rates, "losses": curve.losses, "smoothed": curve.smoothed}
    save_json(folder / f"{name}.json", {**points, "suggestion": curve.suggestion, "diverged": curve.diverged})
    flag = "--teacher-lr" if name == "teacher" else "--lr"
    if curve.suggestion is None:
        print(f"{name}: the loss falls at no rate; look at the data, or at the model")
    else:
        print(f"{name}: the loss falls steepest at {curve.suggestion:.2g}; begin there or below: {flag} ...")
    print("plots: " + " ".join(map(str, paths)))
    return 0
