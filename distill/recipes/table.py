"""The short tables that a run ends with."""

from typing import Any

from neural_layers.distill.report.costs import noun
from neural_layers.distill.report.numbers import count, digits, megabytes, percent
from neural_layers.distill.report.scores import gate_metric, score_named

_SHOWN = {
    "translation": ("bleu", "chrf", "ter", "exact_match"),
    "classification": ("accuracy", "macro_f1", "calibration_error"),
    "language": ("loss", "perplexity", "bits_per_byte"),
}
_NONE = "–"


def print_table(report: dict[str, Any]) -> None:
    """Print the models of a report side by side, its compressed forms, and what the student kept."""
    from rich.console import Console

    console = Console(width=None if Console().is_terminal else 100)
    console.print(_models(report))
    if report.get("compression"):
        console.print(_forms(report))
    console.print(f"{_kept(report)}; {report['seconds']:.0f} s in all", highlight=False)


def _scores(report: dict[str, Any]) -> list[str]:
    """The gate's score and the usual ones, where the student has them."""
    names = dict.fromkeys((gate_metric(report), *_SHOWN[report.get("task", "translation")]))
    return [name for name in names if name in report["models"]["student"]["quality"]]


def _header(name: str) -> str:
    shown = score_named(name)
    return f"{shown.label}, %" if shown.scale == 100 else shown.label


def _table(title: str, headings: list[str]) -> Any:
    from rich.table import Table

    table = Table(title=title)
    for i, heading in enumerate(headings):
        table.add_column(heading, justify="right" if i else "left")
    return table


def _models(report: dict[str, Any]) -> Any:
    examples, names = f"{noun(report)}s", _scores(report)
    headings = ["model", "parameters", *map(_header, names), "ms p50", "ms p95"]
    table = _table(f"{report['title']}: {report['data']['test']:,} test {examples}", headings)
    for name, model in report["models"].items():
        scores = [model["quality"].get(one) for one in names]
        cells = [
            _NONE if value is None else score_named(one).show(value) for one, value in zip(names, scores, strict=True)
        ]
        latency = model["latency_ms"]
        table.add_row(name, count(model["parameters"]), *cells, digits(latency["p50"]), digits(latency["p95"]))
    return table


def _forms(report: dict[str, Any]) -> Any:
    metric = gate_metric(report)
    table = _table("Compressed forms", ["form", "", _header(metric), "kept, %", "MB", "ms p50", "ms p95", "ms p99"])
    for entry in report["compression"]:
        value, kept = (entry["quality"] or {}).get(metric), (entry["retention"] or {}).get(metric)
        latency = entry["latency_ms"] or {}
        table.add_row(
            entry["variant"],
            "passed" if entry["passed"] else "failed",
            _NONE if value is None else score_named(metric).show(value),
            _NONE if kept is None else percent(kept),
            _NONE if entry["file_bytes"] is None else megabytes(entry["file_bytes"]),
            *[_NONE if key not in latency else digits(latency[key]) for key in ("p50", "p95", "p99")],
        )
    return table


def _kept(report: dict[str, Any]) -> str:
    """What the student keeps of each metric that must be kept, whether that is enough, and how often it went back."""
    shares = [
        f"{percent(kept)} % of the teacher's {score_named(metric).label}"
        if kept is not None
        else f"nothing that could be told of the teacher's {score_named(metric).label}"
        for metric, kept in report["retention"].items()
    ]
    said = f"the student keeps {' and '.join(shares)}"
    gate = report.get("gate")
    if not gate:
        return said
    number = len(report.get("rollbacks", []))
    went_back = "1 rollback" if number == 1 else f"{number} rollbacks"
    failed = " and ".join(score_named(metric).label for metric in gate["failed"])
    judged = "passed" if gate["passed"] else f"failed by {failed}"
    stopped = "" if gate["outcome"] == "finished" else ", stopped by the gate"
    return f"{said}: {judged} ({gate['min_retention']:.0%} asked for), {went_back}{stopped}"
