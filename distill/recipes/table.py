"""The short table that a run ends with."""

from typing import Any


def print_table(report: dict[str, Any]) -> None:
    """Print the models of a report side by side, and what the student kept."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{report['title']}: {report['data']['test']:,} test sentences")
    for heading in ("model", "parameters", "BLEU", "chrF", "TER", "exact", "ms p50", "ms p95"):
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for name, model in report["models"].items():
        quality, latency = model["quality"], model["latency_ms"]
        table.add_row(
            name,
            f"{model['parameters']:,}",
            f"{quality['bleu']:.1f}",
            f"{quality['chrf']:.1f}",
            f"{quality['ter']:.1f}",
            f"{quality['exact_match']:.1%}",
            f"{latency['p50']:.1f}",
            f"{latency['p95']:.1f}",
        )
    console = Console(width=None if Console().is_terminal else 100)
    console.print(table)
    kept = report["retention"]["bleu"]
    said = "the teacher's BLEU is 0: nothing to keep" if kept is None else f"the student keeps {kept:.1%} of its BLEU"
    console.print(f"{said}; {report['seconds']:.0f} s in all")
