"""The results as tables, in the terminal and in Markdown, from the same cells."""

from typing import Any

from neural_layers.benchmarks.case import OURS

Result = dict[str, Any]
Cells = list[str]

RATIO = "×"
SMALLEST_MB = 1.0  # below it, the figure is the noise of the measurement
_MODES = {"forward": "forward", "both": "forward + backward"}


def headings(case: Result) -> Cells:
    """The columns' names: size, contender, then time, spread and ratio of each mode, then memory and its ratio."""
    modes = _modes(case)
    times = [heading for mode in modes for heading in (f"{_short(mode)} ms", "±", RATIO)]
    memory = [heading for mode in modes for heading in (f"{_short(mode)} MB", RATIO)]
    return [case["axis"], "contender", *times, *memory]


def rows(case: Result) -> list[list[Cells]]:
    """The rows of each size: our fastest first, as `auto` takes it, then our others, the peers, the limit."""
    modes = _modes(case)
    blocks = []
    for row in case["rows"]:
        base = row["contenders"][row["auto"]]
        block = [_cells(name, entry, base, modes) for name, entry in row["contenders"].items()]
        if any(mode in row["limit"] for mode in modes):
            block.append(_cells("limit", row["limit"], base, modes))
        block[0].insert(0, str(row["size"][case["axis"]]))
        for line in block[1:]:
            line.insert(0, "")
        blocks.append(block)
    return blocks


def title(case: Result, result: Result) -> str:
    """The case with what is the same in all rows."""
    constants = [f"{name} {value}" for name, value in case["constants"].items()]
    threads = result["environment"]["threads"]
    where = "GPU" if result["environment"]["kind"] == "cuda" else f"{threads} thread{'s' * (threads > 1)}"
    return f"{case['name']}: {', '.join([*constants, case['dtype'], where])}"


def remarks(case: Result) -> list[str]:
    """What the figures leave out: who failed, who is absent, and which of our backends cannot run."""
    found: dict[tuple[str, str], list[str]] = {}
    for row in case["rows"]:
        size = str(row["size"][case["axis"]])
        for name, entry in row["contenders"].items():
            if "failed" in entry:
                found.setdefault((f"{name}: not run", entry["failed"]), []).append(size)
            for note in entry.get("notes", []):
                found.setdefault((f"{name}: no backward", note), []).append(size)
            if "unmeasured" in entry.get("memory", {}):
                found.setdefault(("memory: not measured", entry["memory"]["unmeasured"]), []).append(size)
        if row.get("untimed"):
            found.setdefault(("nobody is timed", row["untimed"]), []).append(size)
        if "failed" in row["limit"]:
            found.setdefault(("limit: not measured", row["limit"]["failed"]), []).append(size)
    everywhere = len(case["rows"]) + len(case["failed"])
    for size, reason in case["failed"].items():
        found.setdefault(("not run", reason), []).append(size)
    lines = [f"limit: {case['limit']}"] if any("forward" in row["limit"] for row in case["rows"]) else []
    for (what, why), sizes in found.items():
        at = "" if len(set(sizes)) == everywhere else f" at {case['axis']} {', '.join(dict.fromkeys(sizes))}"
        lines.append(f"{what}{at}: {why}")
    lines += [f"{OURS} {name}: not the default: {reason}" for name, reason in case["by_name_only"].items()]
    lines += [f"{OURS} {name}: not timed: {reason}" for name, reason in case["backends"].items()]
    return lines + [f"{name}: absent: {reason}" for name, reason in case["absent"].items()]


def print_tables(result: Result) -> None:
    """Print an op's tables; as wide as the terminal, 100 columns where there is none."""
    from rich import box
    from rich.table import Table

    console = _console()
    for case in result["cases"]:
        table = Table(title=title(case, result), box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0), title_justify="left")
        for i, heading in enumerate(headings(case)):
            table.add_column(heading, justify="left" if i == 1 else "right", no_wrap=i != 1)
        for block in rows(case):
            for line in block:
                table.add_row(*line, style="bold" if line[1].startswith(OURS) else "")
            table.add_section()
        console.print(table)
        for remark in remarks(case):
            console.print(f"  {remark}", style="dim", markup=False)
        console.print()


def print_legend() -> None:
    """Print what the columns mean, once below all tables."""
    _console().print(LEGEND, style="dim", markup=False)


def _console() -> Any:
    from rich.console import Console

    return Console(width=None if Console().is_terminal else 100, highlight=False)


LEGEND = (
    f"{RATIO} is a contender's time or memory divided by that of the first line of its size, {OURS} as it runs by "
    "default. ± is the distance between the quartiles in percent of the median. MB is the peak above the inputs."
)


def markdown_table(case: Result) -> str:
    """The same table for a page."""
    lines = [headings(case), ["---:", ":---", *["---:"] * (len(headings(case)) - 2)]]
    for block in rows(case):
        lines += [[f"**{cell}**" if cell and i < 2 else cell for i, cell in enumerate(block[0])], *block[1:]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _modes(case: Result) -> list[str]:
    """What was measured of anybody."""
    return [
        mode for mode in _MODES
        if any(mode in entry for row in case["rows"] for entry in row["contenders"].values())
    ]  # fmt: skip


def _short(mode: str) -> str:
    return {"forward": "fwd", "both": "f+b"}[mode]


def _cells(name: str, entry: Result, base: Result, modes: list[str]) -> Cells:
    cells = [name]
    for mode in modes:
        if mode in entry:
            times = entry[mode]
            cells += [number(times["median"] * 1e3), _spread(times), _ratio(times, base.get(mode))]
        else:
            cells += ["failed" if "failed" in entry else "", "", ""]
    memory, base_memory = entry.get("memory", {}), base.get("memory", {})
    for mode in modes:
        if mode in memory:
            cells += [_megabytes(memory[mode]), _memory_ratio(memory[mode], base_memory.get(mode))]
        else:
            cells += ["", ""]
    return cells


def number(value: float) -> str:
    """Three digits that count: 0.0123, 1.23, 12.3, 123, 1230."""
    if value == 0:
        return "0"
    digits = 2
    while abs(value) < 10**digits and digits > -4:
        digits -= 1
    return f"{value:.{max(0, 2 - digits)}f}"


def _spread(times: Result) -> str:
    if times["count"] == 1:
        return "1 run"
    return f"{(times['upper'] - times['lower']) / times['median']:.0%}"


def _ratio(times: Result, base: Result | None) -> str:
    return "" if base is None else _times(times["median"] / base["median"])


def _times(ratio: float) -> str:
    """Two digits that count."""
    digits = next((i for i, least in enumerate((9.95, 0.95, 0.095, 0.0095)) if ratio >= least), 4)
    return f"{ratio:.{digits}f}"


def _megabytes(value: float) -> str:
    return f"<{SMALLEST_MB:.0f}" if value < SMALLEST_MB else number(value)


def _memory_ratio(value: float, base: float | None) -> str:
    if base is None or value < SMALLEST_MB:
        return ""
    return f">{_times(value / SMALLEST_MB)}" if base < SMALLEST_MB else _times(value / base)
