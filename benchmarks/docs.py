"""`python -m benchmarks.docs`: docs/benchmarks.md and its pictures from the recorded results, and nothing else."""

import os
import sys
from pathlib import Path
from typing import Any

from neural_layers.benchmarks.cases import CASES
from neural_layers.benchmarks.record import RESULTS, plot_name, read_result, write_plots
from neural_layers.benchmarks.table import markdown_table, remarks, title
from neural_layers.distill.files import replacing

PAGE = RESULTS.parent.parent / "docs" / "benchmarks.md"
Result = dict[str, Any]

INTRODUCTION = """# Benchmarks

Written by `make bench-docs` from the files in `benchmarks/results/`, which `python -m benchmarks --record` writes; not
by hand. To measure on your machine: `python -m benchmarks`, or `neural-layers bench` where the package is installed
(`pip install 'neural-layers[bench]'`); `--quick` takes under three minutes, `--help` tells the rest.

**How it is measured.** All contenders run in one process, in turns, so that whatever else the machine does hits all of
them alike. Each gets the layout that it likes best, made beforehand, and its best known call, which stands below each
table. All must compute the same: a contender whose output differs is not timed. Times are medians; a call of less than
50 ms is made once more before each reading, so that it finds its own data in the caches and not its neighbour's. *fwd*
is the forward without gradients, *f+b* forward and backward with the gradients of all inputs. *MB* is the peak of
memory above the inputs, output included, of one call in a process of its own (on a GPU, of torch's allocator).

**How to read it.**

- **×** is a contender's time or memory divided by that of the first line of its size, which is this library as it runs
  by default (`backend="auto"`): 62 means that ours is 62 times as fast, 0.8 that ours takes 1.25 times as long. For
  memory, `>20` is 20 times what can be told apart from nothing (1 MB).
- **±** is the distance between the quartiles in percent of the median. Ratios whose difference is within it say
  nothing. `1 run`: the call takes so long that it was timed once.
- **limit** is timed in the same turns: what no implementation can beat, such as copying as many bytes as must be read
  and written, or the matrix products alone. Its × is the share of the limit that ours reaches. torch's copy is no law
  of nature: what stays in a cache may exceed it.
- What a call frees goes back to the system as the C library's allocator decides. A call with large temporaries pays
  for fetching them again, and by chance more or less: that is part of its cost in a user's process, and most of its ±.
- Only figures of one table may be compared. Where ours is slower it stands here as it was measured, like all else.
"""


def page(results: Path = RESULTS, page_folder: Path = PAGE.parent) -> str:
    """The page's text for what is recorded below `results`."""
    link = Path(os.path.relpath(results, page_folder)).as_posix()
    machines = sorted(folder for folder in results.iterdir() if folder.is_dir()) if results.is_dir() else []
    parts = [INTRODUCTION]
    for folder in machines:
        recorded = _in_order([read_result(path) for path in sorted(folder.glob("*.json"))])
        if recorded:
            parts += [_machine(folder.name, recorded), *(_op(result, f"{link}/{folder.name}") for result in recorded)]
    return "\n".join(parts)


def main() -> int:
    """Draw the pictures anew and write the page; print the paths."""
    for path in sorted(RESULTS.glob("*/*.json")):
        for picture in write_plots(path.parent, read_result(path)):
            print(picture)
    with replacing(PAGE) as beside:
        beside.write_text(page(), encoding="utf-8")
    print(PAGE)
    return 0


def _in_order(results: list[Result]) -> list[Result]:
    """In the order of the table of cases, one thread first."""
    order = {case.op: i for i, case in enumerate(CASES.values())}
    return sorted(results, key=lambda result: (order.get(result["op"], len(order)), result["environment"]["threads"]))


def _machine(name: str, results: list[Result]) -> str:
    environment = results[0]["environment"]
    cpu = environment["cpu"]
    lines = [f"## {name}", ""]
    if environment["kind"] == "cuda":
        lines.append(f"- **GPU**: {environment['device']}")
    lines += [
        f"- **Processor**: {cpu['name']}, {cpu['cores']} cores; {', '.join(cpu['flags'])}",
        f"- **System**: {environment['platform']}",
        f"- **Versions**: {', '.join(f'{package} {version}' for package, version in environment['versions'].items())}",
        "",
    ]
    return "\n".join(lines)


def _op(result: Result, link: str) -> str:
    environment = result["environment"]
    facts = [
        environment["date"][:10],
        f"commit {environment['commit'] or 'unknown'}",
        f"load {environment['load'][0]}" if environment["load"] else "",
        f"C kernels: {environment['native'] or 'not built'}" if environment["kind"] == "cpu" else "",
        ", ".join(f"{name}={value}" for name, value in environment["variables"].items()),
        "few repeats (`--quick`)" if result["effort"] == "quick" else "",
    ]
    threads = environment["threads"]
    lines = [
        f"### {result['op']}{f', {threads} threads' if threads > 1 else ''}",
        "",
        "; ".join(filter(None, facts)),
        "",
    ]
    for case in result["cases"]:
        lines += [f"**{title(case, result)}**: {case['about']}", "", markdown_table(case), ""]
        if len(case["rows"]) > 1:
            lines += [f"![{case['name']} over {case['axis']}]({link}/{plot_name(case, result)})", ""]
        calls = [f"{name}: `{call}`" for name, call in case["calls"].items()]
        lines += [f"- {remark}" for remark in [*calls, *remarks(case)]] + [""]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
