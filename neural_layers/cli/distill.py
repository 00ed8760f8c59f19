"""`neural-layers distill cvm`: teach a translator, distil a smaller one from it, report what was kept."""

import argparse
from pathlib import Path
from typing import Any


def add(subcommands: Any) -> None:
    """Declare `distill` and its recipes."""
    parser = subcommands.add_parser("distill", help="distil a student from a teacher")
    recipes = parser.add_subparsers(required=True, metavar="RECIPE")
    cvm = recipes.add_parser(
        "cvm",
        help="an encoder-decoder translator",
        description="Train a translator (or take one with --teacher), distil a smaller one from it, write a report.",
    )
    cvm.add_argument("--out", type=Path, required=True, metavar="DIR", help="the run's folder, new or empty")
    cvm.add_argument(
        "--data", type=Path, metavar="FILE", help="source<TAB>target lines, .tsv or .tsv.gz; default: embedded corpus"
    )
    cvm.add_argument("--valid", type=Path, metavar="FILE", help="pairs to choose the best weights by")
    cvm.add_argument("--test", type=Path, metavar="FILE", help="pairs that the report judges by")
    cvm.add_argument("--preset", default="tiny", metavar="NAME", help="tiny (default), small or paper")
    cvm.add_argument("--steps", type=int, metavar="N", help="training steps, instead of the preset's")
    cvm.add_argument("--teacher-steps", type=int, metavar="N", help="the teacher's training steps; default: as --steps")
    cvm.add_argument("--teacher", type=Path, metavar="DIR", help="a trained teacher with its tokenizer")
    cvm.add_argument("--tokenizer", type=Path, metavar="DIR", help="a tokenizer, instead of training one on the data")
    cvm.add_argument("--baseline", action="store_true", help="also train the student without the teacher")
    cvm.add_argument("--seed", type=int, default=0, metavar="N")
    cvm.set_defaults(run=run_cvm)


def run_cvm(options: argparse.Namespace) -> int:
    """Run the recipe, print the table and the report's path."""
    from transformers.utils import logging

    from neural_layers.distill.recipes.cvm import CVMOptions, distill_cvm
    from neural_layers.distill.recipes.table import print_table

    logging.disable_progress_bar()  # of loading and saving; training has its own
    fields = {name: value for name, value in vars(options).items() if name in CVMOptions.__dataclass_fields__}
    report = distill_cvm(CVMOptions(**fields), command=options.command_line)
    print_table(report)
    print(f"report: {options.out / 'report.html'}")
    return 0
