"""The report as one page that needs nothing else: no script, no font, no picture from outside."""

from typing import Any

from neural_layers.distill.report.numbers import count, digits, duration
from neural_layers.distill.report.plots import MAX_POINTS, cost_plot, loss_plot, quality_plot, teacher_line
from neural_layers.distill.report.style import CSS
from neural_layers.distill.report.svg import inline_svg
from neural_layers.distill.report.tables import example_table, fact_table, flatten, model_table, text
from neural_layers.distill.report.verdict import judge


def render_report(report: dict[str, Any]) -> str:
    """The HTML page of a distillation report.

    report: the contents of `report.json`, free of NaN. Lists may be empty, the baseline may be missing.

    Raises KeyError where a required entry is missing.
    """
    title = text(report["title"])
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
{_header(report)}
<h2>Models</h2>
{model_table(report["models"])}
<p class="note">Quality is measured on the test set. BLEU, chrF and exact match: higher is better. TER: lower is better.
1 MB is 1,000,000 bytes. p50 and p95: half and 95 % of the sentences take at most this long.</p>
<h2>Plots</h2>
{_plots(report)}
<h2>Examples</h2>
<p class="note">Worst: the test sentences whose student translation has the lowest chrF. Random: drawn by chance.</p>
{example_table(report["examples"])}
<h2>How this was made</h2>
{_making(report)}
</main>
</body>
</html>
"""


def _header(report: dict[str, Any]) -> str:
    verdict = judge(report)
    remarks = "\n".join(f"<p>{text(remark)}</p>" for remark in verdict.remarks)
    return f"""<h1>{text(report["title"])}</h1>
<p class="verdict">{text(verdict.sentence)}</p>
<p><span class="mark {verdict.status}">{text(verdict.mark)}</span></p>
{remarks}"""


def _plots(report: dict[str, Any]) -> str:
    line = f"Validation BLEU during training. Dashed: the teacher's BLEU on the {teacher_line(report)[1]} set."
    if "baseline" in report["validation"]:
        line += " Baseline: the same student trained without the teacher."
    loss = f"Training loss; a run of more than {MAX_POINTS} logged steps is drawn as means of neighbours."
    cost = "Size on disk and time for one sentence; the thin line reaches from p50 to p95."
    figures = [
        _figure("quality", "", inline_svg(quality_plot(report), "quality"), line),
        _figure("loss", ' class="tall"', inline_svg(loss_plot(report), "loss"), loss),
        _figure("cost", "", inline_svg(cost_plot(report), "cost"), cost),
    ]
    return '<div class="plots">\n' + "\n".join(figures) + "\n</div>"


def _figure(name: str, attributes: str, svg: str, caption: str) -> str:
    return f'<figure id="{name}"{attributes}>\n{svg}\n<figcaption>{text(caption)}</figcaption>\n</figure>'


def _making(report: dict[str, Any]) -> str:
    data = report["data"]
    facts = {
        "data": str(data["name"]),
        "sentences for training, validation, test": " / ".join(count(data[key]) for key in ("train", "valid", "test")),
        "preset": str(report["preset"]),
        "seed": str(report["seed"]),
        "whole run": f"{digits(report['seconds'])} s ({duration(report['seconds'])} h:mm:ss)",
        "created": str(report["created"]),
        "versions": ", ".join(f"{name} {version}" for name, version in report["versions"].items()),
    }
    hyperparameters = flatten(report["hyperparameters"])
    return f"""<pre><code>{text(report["command"])}</code></pre>
{fact_table(facts)}
<details>
<summary>All hyperparameters ({len(hyperparameters)})</summary>
{fact_table(hyperparameters)}
</details>"""
