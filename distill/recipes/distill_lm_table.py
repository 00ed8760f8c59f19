"""The short table that a language model's distillation ends with."""

from typing import Any


def print_table(report: dict[str, Any]) -> None:
    """Print the models of a report side by side, what the student kept, and what the gate says."""
    from rich.console import Console
    from rich.table import Table

    table = Table(title=f"{report['title']}: {report['data']['test']:,} test sequences")
    headings = ("model", "parameters", "loss", "perplexity", "bits per byte", "seq./s", "ms p50", "ms p95")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "model" else "right")
    for name, model in report["models"].items():
        quality, latency = model["quality"], model["latency_ms"]
        table.add_row(
            name,
            f"{model['parameters']:,}",
            f"{quality['loss']:.4f}",
            f"{quality['perplexity']:.4g}",
            f"{quality['bits_per_byte']:.4f}",
            f"{model['throughput']:,.0f}",
            f"{latency['p50']:.1f}",
            f"{latency['p95']:.1f}",
        )
    console = Console(width=None if Console().is_terminal else 100)
    console.print(table)
    _print_compression(report, console, Table)
    gate, kept = report["gate"], report["retention"]
    shares = {name: "nothing to keep" if share is None else f"{share:.1%}" for name, share in kept.items()}
    console.print(
        f"the student keeps {shares['bits_per_byte']} of the teacher's bits per byte and {shares['loss']} of its loss; "
        f"{report['seconds']:.0f} s in all"
    )
    rollbacks = len(report["rollbacks"])
    if rollbacks or gate["outcome"] == "stopped":
        console.print(f"rollbacks: {rollbacks}, the training {gate['outcome']}; best step {gate['best_step']}")
    if not gate["passed"]:
        names = " and ".join(name.replace("_", " ") for name in gate["failed"])
        console.print(f"below the {gate['min_retention']:.0%} that the student must keep: {names}")


def _print_compression(report: dict[str, Any], console: Any, make: Any) -> None:
    if "compression" not in report:
        return
    table = make(title="compressed forms of the student")
    for heading in ("form", "file, kB", "loss", "bits per byte", "kept of the student's", "seq./s", "ms p50", "passed"):
        table.add_column(heading, justify="left" if heading == "form" else "right")
    for form in report["compression"]:
        if form["quality"] is None:
            table.add_row(form["variant"], form["note"])
            continue
        size, kept = form["file_bytes"], form["kept"]["bits_per_byte"]
        table.add_row(
            form["variant"],
            "-" if size is None else f"{size / 1000:,.0f}",
            f"{form['quality']['loss']:.4f}",
            f"{form['quality']['bits_per_byte']:.4f}",
            "-" if kept is None else f"{kept:.1%}",
            f"{form['throughput']:,.0f}",
            f"{form['latency_ms']['p50']:.1f}",
            "yes" if form["passed"] else "no",
        )
    console.print(table)
