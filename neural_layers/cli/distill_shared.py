"""What the commands of all distillation recipes share."""

import argparse
from typing import Any

from neural_layers.cli.train import add_tracking

DEGRADED = 3  # the exit status where the student keeps too little of its teacher's quality


def add_gate(parser: argparse.ArgumentParser, metric: str, *others: str) -> None:
    """The options of the `QualityGate`; without others there is no choice of the metric."""
    group = parser.add_argument_group("quality gate" if others else f"quality gate, on the validation {metric}")
    if others:
        group.add_argument(
            "--metric", default=metric, metavar="NAME", help=f"{metric} (default) or {' or '.join(others)}"
        )
    group.add_argument(
        "--max-drop", type=float, default=0.05, metavar="X", help="a larger fall goes back; default: 0.05"
    )
    group.add_argument("--gate-patience", type=int, default=3, metavar="N", help="times to go back; default: 3")
    group.add_argument("--lr-factor", type=float, default=0.5, metavar="X", help="of the rate each time; default: 0.5")
    group.add_argument("--min-retention", type=float, default=0.9, metavar="X", help="of the teacher's; default: 0.9")
    group.add_argument("--confidence", type=float, default=0.95, metavar="X", help="of the intervals; default: 0.95")
    group.add_argument("--samples", type=int, default=1000, metavar="N", help="of the bootstrap; default: 1000")


def add_running(group: Any) -> None:
    """The options that are about the run as such."""
    group.add_argument("--precision", default="auto", metavar="NAME", help="auto (default), float32, bf16 or fp16")
    group.add_argument("--seed", type=int, default=0, metavar="N")
    add_tracking(group, default="tensorboard")
    group.add_argument("--threads", type=int, metavar="N", help="of the CPU; the same bits need the same number")


def prepare(options: argparse.Namespace, *packages: str) -> None:
    """Check what must be installed, quieten the libraries, set the number of threads.

    Raises ImportError with the extra to install, InputError for a number of threads that cannot be.
    """
    from neural_layers.errors import InputError, require

    require("transformers", "accelerate", "tqdm", "matplotlib", *packages, extra="train")
    import torch
    from transformers.utils import logging

    logging.disable_progress_bar()  # of loading and saving; training has its own
    logging.set_verbosity_error()  # what loading a model has to say is said by the recipe, as errors
    if options.threads is not None:
        if options.threads < 1:
            raise InputError(f"--threads {options.threads} must be at least 1")
        torch.set_num_threads(options.threads)


def chosen(options: argparse.Namespace, kind: Any) -> Any:
    """The recipe's options, of the dataclass `kind`, out of the command line."""
    given = {name: value for name, value in vars(options).items() if name in kind.__dataclass_fields__}
    return kind(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})


def conclude(report: dict[str, Any], options: argparse.Namespace) -> int:
    """Print the table and the report's path; the exit status."""
    from neural_layers.distill.recipes.table import print_table

    print_table(report)
    print(f"report: {options.out / 'report.html'}")
    return 0 if report["gate"]["passed"] else DEGRADED
