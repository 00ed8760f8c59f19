"""Compile every Triton kernel ahead of time, from its real host code, for GPUs that need not be there.

    python -m tests.triton.aot [--target sm_90 …] [--op swiglu …] [--quick]

Prints op, kernel, target, registers, spills and shared memory, and exits with 1 where a kernel does not compile, spills
registers, or takes more shared memory than a block of the target may have. Kernels that Triton's cache holds are not
compiled again.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator

from tests.check_types import ROOT

# Bytes of shared memory that one block may take.
SHARED_LIMIT = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
QUICK_TARGET = "sm_90"


def compile_launches(target: str, launches: list[str]) -> Iterator[dict]:
    """The resources of every kernel, in a child process; raises RuntimeError with its last words where it fails."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "tests.triton.compiling", target, *launches]
    with tempfile.TemporaryFile("w+") as errors:
        child = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True)
        assert child.stdout is not None
        for line in child.stdout:
            yield json.loads(line)
        if child.wait():
            errors.seek(0)
            raise RuntimeError(f"compiling for {target} failed:\n{errors.read()[-4000:]}")


def fault(resources: dict) -> str | None:
    """What is wrong with a kernel's resources, in words."""
    limit = SHARED_LIMIT[resources["target"]]
    if resources["shared"] > limit:
        return f"takes {resources['shared']} bytes of shared memory; a block may have {limit}"
    return f"spills {resources['spills']}" if resources["spills"] else None


def launch_names(ops: list[str], quick: bool) -> list[str]:
    """The launches of these ops (of all where none is named), by name."""
    from tests.triton.launches import all_launches

    launches = all_launches()
    unknown = set(ops) - {launch.op for launch in launches}
    if unknown:
        raise SystemExit(f"no launches of {', '.join(unknown)}; there are {', '.join({x.op for x in launches})}")
    return [str(x) for x in launches if (not ops or x.op in ops) and (x.quick or not quick)]


def main() -> int:
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
    from rich.table import Table

    parser = argparse.ArgumentParser(description="Compile every Triton kernel ahead of time.")
    parser.add_argument("--target", nargs="+", choices=SHARED_LIMIT, default=list(SHARED_LIMIT))
    parser.add_argument("--op", nargs="+", default=[])
    parser.add_argument("--quick", action="store_true", help="the launches that `make test` compiles")
    arguments = parser.parse_args()
    names = launch_names(arguments.op, arguments.quick)

    table = Table("op", "launch", "kernel", "target", "registers", "spills", "shared bytes", "fault", title="Kernels")
    kernels = faults = 0
    columns = TextColumn("{task.description}"), MofNCompleteColumn(), TimeElapsedColumn()
    console = Console(width=None if sys.stdout.isatty() else 160)
    with Progress(*columns, console=console) as progress:
        for target in arguments.target:
            task = progress.add_task(target, total=len(names))
            done = set()
            for r in compile_launches(target, names):
                done.add((r["op"], r["launch"]))
                progress.update(task, completed=len(done), description=f"{target} {r['op']}: {r['launch']}")
                wrong = fault(r)
                kernels, faults = kernels + 1, faults + bool(wrong)
                columns_of_row = (r["op"], r["launch"], r["kernel"], target, r["registers"], r["spills"], r["shared"])
                table.add_row(*map(str, columns_of_row), wrong or "", style="red" if wrong else "")
            progress.update(task, description=target)
    console.print(table)
    console.print(f"{kernels} kernels compiled, {faults} with a fault")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
