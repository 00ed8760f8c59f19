"""`neural-layers bench`: measure ops and their peers side by side; `python -m benchmarks` is the same."""

import argparse
import os
from pathlib import Path
from typing import Any


def add(subcommands: Any) -> None:
    """Declare `bench`."""
    parser = subcommands.add_parser(
        "bench",
        help="measure ops beside other libraries' in the same run",
        description="Time every backend of an op and its peers in turns, measure their memory, print tables.",
    )
    parser.add_argument(
        "ops", nargs="*", metavar="OP", help="an op of neural_layers.functional, decode or train_step; default: all ops"
    )
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="default: cpu")
    parser.add_argument("--quick", action="store_true", help="fewer sizes and repeats: under three minutes for all ops")
    parser.add_argument("--threads", type=int, default=1, metavar="N", help="of the CPU; default: 1")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write <op>.json and plots there; default: nowhere")
    parser.add_argument(
        "--record",
        action="store_true",
        help="write to benchmarks/results/<machine> of the checkout, for make bench-docs",
    )
    parser.add_argument("--tiny", action="store_true", help=argparse.SUPPRESS)  # for tests: seconds for all ops
    parser.set_defaults(run=run_bench)


def run_bench(options: argparse.Namespace) -> int:
    """Measure, print the tables and where files were written."""
    from neural_layers.errors import InputError, require

    require("rich", "matplotlib", extra="bench")
    # Before it is imported: that it runs without its CUDA kernels here is what the table says anyway.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    from neural_layers.benchmarks import default_ops, run_benchmarks
    from neural_layers.benchmarks.environment import machine_slug
    from neural_layers.benchmarks.progress import Progress
    from neural_layers.benchmarks.record import results_folder, write_result
    from neural_layers.benchmarks.table import print_legend, print_tables

    if options.out and options.record:
        raise InputError("--out and --record both name where results are written; give one of them")
    if options.out and options.out.exists() and not options.out.is_dir():
        raise InputError(f"{options.out} is a file; --out takes a folder")
    effort = "tiny" if options.tiny else "quick" if options.quick else "full"
    chosen = list(dict.fromkeys(options.ops)) or default_ops()
    folder = results_folder(machine_slug(options.device)) if options.record else options.out
    progress, written = Progress(), list[Path]()
    try:
        for result in run_benchmarks(
            chosen, device=options.device, effort=effort, threads=options.threads, tell=progress
        ):
            progress.pause()
            print_tables(result)
            if folder is not None:
                written += write_result(folder, result)
    finally:
        progress.pause()
    print_legend()
    for path in written:
        print(path)
    return 0
