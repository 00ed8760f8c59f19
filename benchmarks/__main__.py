"""`python -m benchmarks [OP …] [--quick] [--threads N]`."""

import argparse

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table

from neural_layers.benchmarks.cases import CASES
from neural_layers.benchmarks.timing import medians


def main() -> None:
    """Measure the chosen ops and print a table: median milliseconds, forward and forward + backward."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"of {', '.join(CASES)}; default: all")
    parser.add_argument("--quick", action="store_true", help="smaller sizes and fewer repeats")
    parser.add_argument("--threads", type=int, default=1, help="default: 1")
    options = parser.parse_args()
    unknown = [op for op in options.ops if op not in CASES]
    if unknown:
        parser.error(f"there is no benchmark of {unknown[0]!r}; there are {', '.join(CASES)}")
    torch.set_num_threads(options.threads)
    torch.manual_seed(0)

    table = Table(title=f"median ms, {options.threads} thread(s), torch {torch.__version__}, float32")
    for heading in ("op", "size", "contender", "forward", "forward + backward"):
        table.add_column(heading, justify="right" if heading.startswith("forward") else "left")
    for op in track(options.ops or list(CASES), description="measuring"):
        case = CASES[op](options.quick)
        for name, (forward, both) in medians(case, repeats=5 if options.quick else 15).items():
            table.add_row(op, case.size, name, f"{forward:.2f}", f"{both:.2f}")
        table.add_section()
    Console(width=None if Console().is_terminal else 100).print(table)


if __name__ == "__main__":
    main()
