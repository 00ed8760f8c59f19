"""Results as files: JSON, and a picture of each case that has several sizes."""

import json
from pathlib import Path
from typing import Any

from neural_layers.benchmarks.plots import plot_case, png
from neural_layers.benchmarks.run import FORMAT
from neural_layers.benchmarks.table import title
from neural_layers.distill.files import replacing, save_json
from neural_layers.errors import InputError

RESULTS = Path(__file__).resolve().parent / "results"
_CHECKOUT = RESULTS.parent.parent

Result = dict[str, Any]


def results_folder(machine: str) -> Path:
    """`benchmarks/results/<machine>`, where recorded results live; raises InputError outside a checkout."""
    if not (_CHECKOUT / "pyproject.toml").is_file():
        raise InputError("--record writes to a checkout's benchmarks/results; here, give --out DIR")
    return RESULTS / machine


def write_result(folder: Path, result: Result) -> list[Path]:
    """Write `<op>.json`, with the number of threads in the name where there is more than one, and its pictures."""
    path = folder / f"{stem(result)}.json"
    save_json(path, result)
    return [path, *write_plots(folder, result)]


def write_plots(folder: Path, result: Result) -> list[Path]:
    """Draw a result's pictures; a case with one size has none."""
    written = []
    for case in result["cases"]:
        figure = plot_case(case, title(case, result))
        if figure is not None:
            path = folder / plot_name(case, result)
            with replacing(path) as beside:
                beside.write_bytes(png(figure))
            written.append(path)
    return written


def read_result(path: Path) -> Result:
    """Read `<op>.json`; raises InputError for a file of another format."""
    try:
        result: Result = json.loads(path.read_text(encoding="utf-8"))
        found = result["format"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} holds no benchmark results: {error}") from error
    if found != FORMAT:
        raise InputError(f"{path} has format {found}; this version reads {FORMAT}: measure again")
    return result


def stem(result: Result) -> str:
    """The name of a result's file without its ending."""
    return result["op"] + _threads(result)


def plot_name(case: Result, result: Result) -> str:
    """The name of a case's picture."""
    return f"{case['name']}{_threads(result)}.png"


def _threads(result: Result) -> str:
    threads = result["environment"]["threads"]
    return "" if threads == 1 else f"-{threads}-threads"
