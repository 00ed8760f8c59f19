"""The table that ends the training of an adapter."""

from pathlib import Path
from typing import Any


def print_adapter(report: dict[str, Any]) -> None:
    """Print a report's figures, the model as it was beside the adapted one, and where the adapter is."""
    from rich.console import Console
    from rich.table import Table

    console, before, after = Console(), report["before"], report["validation"]
    if before and after:
        table = Table("validation", "before", "after")
        for name in ("loss", "perplexity", "bits_per_byte"):
            table.add_row(name.replace("_", " "), f"{before[name]:.4f}", f"{after[name]:.4f}")
        console.print(table)
    figures = Table(show_header=False)
    trainable, whole = report["trainable"], report["base_and_adapter"]
    figures.add_row("trained", f"{trainable:,} of {whole:,} parameters ({report['share']:.2%})")
    figures.add_row("steps", f"{report['steps']:,}")
    figures.add_row("peak memory", f"{report['peak_memory_mib']:,.0f} MiB")
    figures.add_row("seconds", f"{report['seconds']:,}")
    console.print(figures)
    print(f"adapter: {report['model']}")
    print(f"report: {Path(report['model']).parent / 'report.json'}")
