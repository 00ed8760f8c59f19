"""The tables of a classifier: scores of each class, and which class is taken for which."""

from typing import Any

from neural_layers.distill.report.html_table import table, text
from neural_layers.distill.report.numbers import count, percent

ORDER = ("teacher", "student", "baseline")
MEASURES = {"f1": "F1", "precision": "precision", "recall": "recall"}


def class_table(classes: dict[str, Any]) -> str:
    """One row for each class: how many test texts it has, then F1, precision and recall of each model."""
    models = [name for name in ORDER if name in classes["f1"]]
    measures = [(key, label) for key, label in MEASURES.items() if key in classes]
    # With one model after the other in each measure, the numbers that are compared stand side by side.
    headers = ["class", "test texts"] + [f"{label}, {name}, %" for _, label in measures for name in models]
    rows = []
    for i, label in enumerate(classes["labels"]):
        values = [classes[key][name][i] for key, _ in measures for name in models]
        rows.append([text(label), count(classes["support"][i]), *["–" if v is None else percent(v) for v in values]])
    return table("numbers cards", headers, rows)


def confusion_tables(classes: dict[str, Any]) -> str:
    """A matrix for each model: a row for each true class, a column for each that was predicted, counts in the cells.

    Columns are numbered as the rows are. Right answers are bold and framed; a deeper ground means a larger share of the
    row.
    """
    names, labels = [name for name in ORDER if name in classes["confusion"]], classes["labels"]
    # On a narrow page the rows have numbers alone, and their names stand above the first matrix.
    key = ", ".join(f"<b>{i}</b> {text(label)}" for i, label in enumerate(labels, start=1))
    matrices = "\n".join(_matrix(name, labels, classes["confusion"][name]) for name in names)
    return f'<p class="key">{key}</p>\n<div class="matrices">{matrices}</div>'


def _matrix(name: str, labels: list[str], matrix: list[list[int]]) -> str:
    numbers = "".join(f'<th scope="col" title="{text(label)}">{i}</th>' for i, label in enumerate(labels, start=1))
    rows = ""
    for i, (label, counts) in enumerate(zip(labels, matrix, strict=True)):
        total = max(sum(counts), 1)
        cells = "".join(_cell(value, value / total, i == j) for j, value in enumerate(counts))
        rows += f'<tr><th scope="row"><b>{i + 1}</b><span> {text(label)}</span></th>{cells}</tr>\n'
    # tabindex: what scrolls sideways must be reached from the keyboard too.
    return f"""<div><p class="matrix">{text(name)}: true class (row), predicted class (column)</p>
<div class="scroll" tabindex="0" role="group" aria-label="confusion matrix of the {text(name)}">
<table class="confusion">
<thead><tr><td></td>{numbers}</tr></thead><tbody>
{rows}</tbody></table></div></div>"""


def _cell(value: int, share: float, is_right: bool) -> str:
    kind = ' class="right"' if is_right else ' class="none"' if value == 0 else ""
    return f'<td{kind} style="--share:{100 * share:.0f}%">{count(value)}</td>'
