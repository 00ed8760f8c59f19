"""The report as one page that needs nothing else: no script, no font, no picture from outside."""

from typing import Any

from neural_layers.distill.report.costs import noun
from neural_layers.distill.report.html_table import fact_table, flatten, prose, text
from neural_layers.distill.report.numbers import count, digits, duration
from neural_layers.distill.report.scores import gate_metric, is_language, is_translation, score_named
from neural_layers.distill.report.sections import (
    class_section,
    compression_section,
    cost_section,
    error_section,
    training_section,
)
from neural_layers.distill.report.style import CSS
from neural_layers.distill.report.tables import example_table, quality_table
from neural_layers.distill.report.verdict import judge


def render_report(report: dict[str, Any]) -> str:
    """The HTML page of a distillation report.

    report: the contents of `report.json`, free of NaN. Lists may be empty; the baseline, the gate, rollbacks, the error
    analysis, classes and compressed forms may be missing.

    Raises KeyError where a required entry is missing.
    """
    title = text(report["title"])
    parts = [
        _header(report), _quality(report), cost_section(report), training_section(report), error_section(report),
        class_section(report), compression_section(report), _examples(report), _making(report),
    ]  # fmt: skip
    body = "\n".join(part for part in parts if part)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
{CSS}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""


def _header(report: dict[str, Any]) -> str:
    verdict = judge(report)
    remarks = "\n".join(f"<p>{prose(remark)}</p>" for remark in verdict.remarks)
    return f"""<h1>{text(report["title"])}</h1>
<p class="verdict">{prose(verdict.sentence)}</p>
<p><span class="mark {verdict.status}">{prose(verdict.mark)}</span></p>
{remarks}"""


def _quality(report: dict[str, Any]) -> str:
    interval = " The interval is that of the bootstrap." if report.get("retention_interval") else ""
    return f"""<h2>Teacher and student</h2>
{quality_table(report)}
<p class="note">Measured on the test set. Higher is better but where it is said otherwise. Kept: the student's score as
a share of the teacher's, or the teacher's of the student's where lower is better.{interval}</p>"""


def _examples(report: dict[str, Any]) -> str:
    if is_translation(report):
        note = "Worst: the test sentences whose student translation has the lowest chrF."
    elif is_language(report):
        note = "Worst: the test sequences on which the student's loss is above the teacher's by most."
    else:
        note = "Worst: the wrong answers that the student is surest of."
    return f"""<h2>Examples</h2>
<p class="note">{note} Random: drawn by chance.</p>
{example_table(report)}"""


def _making(report: dict[str, Any]) -> str:
    data = report["data"]
    facts = {
        "data": str(data["name"]),
        f"{noun(report)}s for training, validation, test": " / ".join(
            count(data[k]) for k in ("train", "valid", "test")
        ),
        "judged by": score_named(gate_metric(report)).label,
        "preset": str(report["preset"]),
        "seed": str(report["seed"]),
        "whole run": f"{digits(report['seconds'])} s ({duration(report['seconds'])} h:mm:ss)",
        "created": str(report["created"]),
        "versions": ", ".join(f"{name} {version}" for name, version in report["versions"].items()),
    }
    hyperparameters = flatten(report["hyperparameters"])
    gate = flatten(report.get("gate", {}))
    gate_facts = f"<h3>Quality gate</h3>\n{fact_table(gate)}\n" if gate else ""
    return f"""<h2>How this was made</h2>
<pre><code>{text(report["command"])}</code></pre>
{fact_table(facts)}
{gate_facts}<details>
<summary>All hyperparameters ({len(hyperparameters)})</summary>
{fact_table(hyperparameters)}
</details>"""
