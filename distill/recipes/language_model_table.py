"""The table that ends a training of a language model."""

from pathlib import Path
from typing import Any


def print_training(report: dict[str, Any], out: Path) -> None:
    """Print a report's figures and the paths of a run."""
    from rich.console import Console
    from rich.table import Table

    validation, table = report["validation"], Table(show_header=False)
    rows = [
        ("parameters", f"{report['parameters']:,}"),
        ("steps", f"{report['steps']:,}" + ("" if report["step"] == report["steps"] else f", best {report['step']:,}")),
        ("training loss", _number(report["train_loss"])),
        ("validation loss", _number(validation.get("loss"))),
        ("perplexity", _number(validation.get("perplexity"))),
        ("bits per byte", _number(validation.get("bits_per_byte"))),
        ("seconds", f"{report['seconds']:,}"),
    ]
    for name, value in rows:
        table.add_row(name, value)
    Console().print(table)
    print(f"model: {report['model']}")
    if (out / "tensorboard").is_dir():
        print(f"TensorBoard: tensorboard --logdir {out / 'tensorboard'}")


def _number(value: float | None) -> str:
    return "–" if value is None else f"{value:.4f}"
