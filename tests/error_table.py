"""`python -m tests.error_table`: docs/errors.md, the largest error of every backend of every op in every dtype.

Arguments are drawn once and for all (`tests/op_cases.py`), so that the page is the same each time on one machine. What
is chosen when the library is imported, the instruction set of the C kernels and Triton's interpreter, is measured in a
process of its own.
"""

import json
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from hypothesis import HealthCheck, Phase, given, settings
from torch import Tensor

import neural_layers
import neural_layers.functional as F
from neural_layers.benchmarks.environment import cpu_name
from neural_layers.kernels import c_library, triton_support
from neural_layers.kernels.dispatch import OPS, BackendError
from tests.op_cases import CASES, LONGEST, LONGEST_SMALL, OpCases, cast
from tests.op_checks import Arguments, relative_error, seeded
from tests.tolerances import FORWARD, GRADIENT, INT8

PAGE = Path(__file__).resolve().parent.parent / "docs" / "errors.md"
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in FORWARD}
EXAMPLES, EXAMPLES_SMALL = 60, 4


@dataclass
class Row:
    """The largest errors of a backend in a dtype; `gradient` is None where the op has none."""

    op: str
    backend: str
    dtype: str
    value: float = 0.0
    gradient: float | None = None
    examples: int = 0


def draw_examples(cases: OpCases, count: int, longest: int) -> list[Arguments]:
    """That many arguments of an op, the same each time."""
    drawn: list[Arguments] = []

    @settings(
        max_examples=count, derandomize=True, database=None, deadline=None, phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )  # fmt: skip
    @given(cases.arguments(longest))
    def collect(arguments: Arguments) -> None:
        drawn.append(arguments)

    collect()
    return drawn


def measure(op: str, backends: list[str], count: int, longest: int) -> list[Row]:
    """The errors of an op's backends over drawn arguments, in every dtype that they take."""
    rows: dict[tuple[str, str], Row] = {}
    for arguments in draw_examples(CASES[op], count, longest):
        for label, dtype in DTYPES.items():
            rounded = cast(arguments, dtype)
            able = [backend for backend in backends if _can(op, rounded, backend)]
            if not able:
                continue
            expected = _run(op, cast(rounded, torch.float64), "reference", dtype)
            for backend in able:
                row = rows.setdefault((backend, label), Row(op, backend, label))
                _take_up(row, _run(op, rounded, backend, dtype), expected)
    return list(rows.values())


def _can(op: str, arguments: Arguments, backend: str) -> bool:
    try:
        neural_layers.explain(op, **arguments, backend=backend)
    except BackendError:
        return False
    return True


def _run(op: str, arguments: Arguments, backend: str, dtype: torch.dtype) -> tuple[list[Tensor], list[Tensor | None]]:
    """The outputs, and the gradients of the floating arguments; none where the backend has none.

    dtype: what the outputs' gradients are rounded to, so that an op and its reference in float64 get the same
    """
    floats = {name: v for name, v in arguments.items() if isinstance(v, Tensor) and v.is_floating_point()}
    leaves = {name: value.detach().requires_grad_() for name, value in floats.items()}
    given = arguments | (leaves if _can(op, arguments | leaves, backend) else {})
    outputs = CASES[op].outputs(getattr(F, op)(**given, backend=backend), arguments)
    normal = seeded(1)
    weights = [normal(out.numel()).view(out.shape).to(dtype).double() for out in outputs]
    pairs = zip(outputs, weights, strict=True)
    weighted = [(out.double() * weight).sum() for out, weight in pairs if out.requires_grad]
    if not weighted:
        return list(outputs), []
    grads = torch.autograd.grad(torch.stack(weighted).sum(), list(leaves.values()), allow_unused=True)
    return [out.detach() for out in outputs], list(grads)


def _take_up(
    row: Row, found: tuple[list[Tensor], list[Tensor | None]], expected: tuple[list[Tensor], list[Tensor | None]]
) -> None:
    row.examples += 1
    for out, ref in zip(found[0], expected[0], strict=True):
        row.value = max(row.value, relative_error(out, ref))
    if found[1]:
        for grad, ref_grad in zip(found[1], expected[1], strict=True):
            present = grad if grad is not None else ref_grad
            if present is not None:
                # None is zero: what is left out has no influence.
                pair = [torch.zeros_like(present) if side is None else side for side in (grad, ref_grad)]
                row.gradient = max(row.gradient or 0.0, relative_error(*pair))


def groups() -> list[tuple[str, dict[str, str]]]:
    """What is measured in a process of its own, and the environment that it needs.

    Raises SystemExit where the C kernels or Triton are missing: a page without them would look complete.
    """
    variants = [variant for variant in c_library.VARIANTS if c_library.runs(variant)]
    if not variants:
        raise SystemExit(c_library.MISSING)
    if not triton_support.INSTALLED:
        raise SystemExit("triton is not installed; pip install 'neural-layers[triton]'")
    natives = [(f"native {variant}", {"NEURAL_LAYERS_CPU": variant}) for variant in variants]
    return [("torch", {"TRITON_INTERPRET": "0"}), *natives, ("triton", {"TRITON_INTERPRET": "1"})]


def backends_of(op: str, group: str) -> list[str]:
    """The op's backends that a group measures: its own, or those that no other group does."""
    names = [backend.name for backend in OPS[op].backends if backend.name != "reference"]
    if group == "torch":
        return [name for name in names if not name.startswith(("native", "triton"))]
    return [name for name in names if name.startswith(group.split()[0])]


def is_within_tolerances(row: Row) -> bool:
    """Whether the tests allow these errors."""
    dtype = DTYPES[row.dtype]
    forward = INT8 if row.backend.startswith("native_int8") else FORWARD
    return row.value <= forward[dtype] and (row.gradient is None or row.gradient <= GRADIENT[dtype])


def _measure_group(group: str) -> None:
    """In the child: print a line of JSON for each op."""
    torch.set_num_threads(1)
    small = group == "triton"
    if small:
        from tests.triton.interpreter import repair

        repair()
    for op in F.__all__:
        names = backends_of(op, group)
        measured = measure(op, names, EXAMPLES_SMALL if small else EXAMPLES, LONGEST_SMALL if small else LONGEST)
        variant = group.removeprefix("native") if group.startswith("native") else ""
        rows = [vars(row) | {"backend": row.backend + variant} for row in measured]
        print(json.dumps({"op": op, "rows": rows}), flush=True)


def _measured() -> Iterator[tuple[str, dict[str, Any]]]:
    for group, variables in groups():
        command = [sys.executable, "-m", "tests.error_table", group]
        environment = {**os.environ, **variables, "OMP_NUM_THREADS": "1"}
        with subprocess.Popen(command, stdout=subprocess.PIPE, env=environment, text=True) as child:
            assert child.stdout is not None
            for line in child.stdout:
                yield group, json.loads(line)
        if child.returncode:
            raise SystemExit(f"measuring {group} failed; what went wrong stands above")


def page(rows: list[Row]) -> str:
    """The page's text."""
    order = {op: i for i, op in enumerate(CASES)}
    by_op: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        by_op[row.op].append(row)
    limits = [f"| {name} | {FORWARD[dtype]:.0e} | {GRADIENT[dtype]:.0e} |" for name, dtype in DTYPES.items()]
    recorded = f"Recorded on {cpu_name()} with torch {torch.__version__}."
    lines = [INTRODUCTION, "| dtype | values | gradients |", "|:---|---:|---:|", *limits, "", recorded, ""]
    for op in sorted(by_op, key=order.__getitem__):
        lines += [f"## {op}", "", "| backend | dtype | values | gradients | examples |", "|:---|:---|---:|---:|---:|"]
        for row in by_op[op]:
            gradient = "–" if row.gradient is None else f"{row.gradient:.2e}"
            lines.append(f"| {row.backend} | {row.dtype} | {row.value:.2e} | {gradient} | {row.examples} |")
        lines.append("")
    return "\n".join(lines)


def read_page(text: str) -> list[Row]:
    """The rows of a page, as `page` wrote them."""
    rows, op = list[Row](), ""
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("## "):
            op = line.removeprefix("## ")
        elif op and len(cells) == 5 and cells[4].isdigit():
            gradient = None if cells[3] == "–" else float(cells[3])
            rows.append(Row(op, cells[0], cells[1], float(cells[2]), gradient, int(cells[4])))
    return rows


INTRODUCTION = """# Errors

Written by `make errors`, not by hand. For every backend of every op in every dtype: the largest error found, of the
values and of the gradients of all floating arguments, against the definition in float64 on the same inputs. Inputs and
incoming gradients are rounded to the dtype first: what is shown is the error of the computation. It is relative to the
largest magnitude of the definition's output (at least 1). Shapes and options are drawn by hypothesis, the same each
time; the last column counts the draws that the backend takes. `native avx512`, `avx2`, `baseline`: the C kernels for
that instruction set. `triton`: the kernels in Triton's interpreter, on a few small shapes.

`quantize_4bit` and `quantize_int4` compare codes and scales, which have no error: they are equal, or wrong.
`linear_int8` is compared with the definition of its rounding. `linear_kl_div` is compared without its factor T².
`native_int8` rounds activations to 8 bits, is taken by name only, and has tolerances of its own.
A dash: there is no gradient. The tests allow:
"""


def main() -> int:
    """Measure all groups and write the page; where a group is named, measure that and print it."""
    if len(sys.argv) > 1:
        _measure_group(sys.argv[1])
        return 0
    started, rows = time.monotonic(), list[Row]()
    for group, measured in _measured():
        rows += [Row(**row) for row in measured["rows"]]
        print(f"{time.monotonic() - started:5.0f} s  {group}: {measured['op']}", file=sys.stderr, flush=True)
    PAGE.write_text(page(rows), encoding="utf-8")
    print(PAGE)
    worst = [row for row in rows if not is_within_tolerances(row)]
    for row in worst:
        print(f"above the tolerance: {row}", file=sys.stderr)
    return 1 if worst else 0


if __name__ == "__main__":
    sys.exit(main())
