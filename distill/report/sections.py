"""The parts of the page that hold plots, each with its heading; empty where the report has nothing for them."""

from typing import Any

from neural_layers.distill.report.analysis_plots import length_plot, reliability_plot
from neural_layers.distill.report.class_tables import class_table, confusion_tables
from neural_layers.distill.report.costs import compression_plot, cost_plot, noun
from neural_layers.distill.report.curves import (
    MAX_POINTS,
    loss_plot,
    quality_plot,
    score_plot,
    teacher_line,
    validated_scores,
)
from neural_layers.distill.report.html_table import prose, text
from neural_layers.distill.report.rollbacks import rollback_lines
from neural_layers.distill.report.scores import gate_metric, score_named
from neural_layers.distill.report.svg import inline_svg
from neural_layers.distill.report.tables import compression_table, cost_table, fault_table, rare_table


def cost_section(report: dict[str, Any]) -> str:
    """Sizes and times of the models."""
    one = noun(report)
    caption = f"Size on disk and time for one {one}; the thin line reaches from p50 to p95."
    return f"""<h2>Cost</h2>
{cost_table(report)}
<p class="note">1 MB is 1,000,000 bytes. p50, p95 and p99: half, 95 % and 99 % of the {one}s take at most this long.</p>
{_plots([_figure("cost", inline_svg(cost_plot(report), "cost"), caption)])}"""


def training_section(report: dict[str, Any]) -> str:
    """Curves of the score that counts, of the losses, and of the other scores, with the rollbacks."""
    first = gate_metric(report)
    line = f"Validation {score_named(first).label} during training."
    teacher = teacher_line(report, first)
    if teacher is not None:
        line += f" Dashed: the teacher's {score_named(first).label} on the {teacher[1]} set."
    if "baseline" in report["validation"]:
        line += " Baseline: the same student trained without the teacher."
    losses = loss_plot(report)
    tall = ' class="tall"' if len(losses.axes) > 1 else ""
    loss = f"Training loss; a run of more than {MAX_POINTS} logged steps is drawn as means of neighbours."
    figures = [
        _figure("quality", inline_svg(quality_plot(report), "quality"), line),
        _figure("loss", inline_svg(losses, "loss"), loss, tall),
    ]
    for name in validated_scores(report):
        if name != first:
            shown, svg = score_named(name), inline_svg(score_plot(report, name), f"score-{name}")
            figures.append(_figure(f"score-{name}", svg, f"Validation {shown.header}."))
    return f"<h2>Training</h2>\n{_rollbacks(report)}{_plots(figures)}"


def _rollbacks(report: dict[str, Any]) -> str:
    lines = rollback_lines(report)
    if not lines:
        return '<p class="note">Nothing was rolled back.</p>\n' if "rollbacks" in report else ""
    items = "".join(f"<li>{prose(line)}</li>" for line in lines)
    return f"""<p>Rollbacks, marked in the curves by a triangle with an arrow to the step that training went back to;
crosses joined by dots show what was given up:</p>
<ul class="plain">{items}</ul>
"""


def error_section(report: dict[str, Any]) -> str:
    """Where a translator errs."""
    analysis = report.get("analysis")
    if not analysis:
        return ""
    parts = ["<h2>Error analysis</h2>"]
    if analysis.get("by_length"):
        svg = inline_svg(length_plot(analysis["by_length"]), "length")
        caption = "chrF on the test sentences by the length of the source. Long dashes and triangles: the teacher."
        parts.append(_plots([_figure("length", svg, caption)]))
    if analysis.get("rare"):
        parts.append(f"<h3>Rare tokens</h3>\n{rare_table(analysis['rare'])}")
    parts.append(f"<h3>Faults</h3>\n{fault_table(analysis)}")
    return "\n".join(parts)


def class_section(report: dict[str, Any]) -> str:
    """Where a classifier errs."""
    classes = report.get("classes")
    if not classes:
        return ""
    parts = [f"<h2>Classes</h2>\n{class_table(classes)}"]
    if classes.get("confusion"):
        parts.append(
            '<h3>Confusion</h3>\n<p class="note">How many test texts of the class of a row were taken for the class of '
            "a column. Right answers are framed; the deeper the ground, the larger the share of the row.</p>\n"
            f"{confusion_tables(classes)}"
        )
    if classes.get("reliability"):
        svg = inline_svg(reliability_plot(classes["reliability"]), "reliability")
        looks = {"teacher": "hatched", "baseline": "dotted", "student": "filled"}
        bars = ", ".join(f"{look}: the {name}" for name, look in looks.items() if name in classes["reliability"])
        caption = (
            "Above: how often the models are right when they are so confident; below the dotted, ideal line they are "
            f"too confident. Below: the share of texts at each confidence; {bars}."
        )
        parts.append(f"<h3>Reliability</h3>\n{_plots([_figure('reliability', svg, caption)])}")
    return "\n".join(parts)


def compression_section(report: dict[str, Any]) -> str:
    """What becomes of the student in smaller forms."""
    if not report.get("compression"):
        return ""
    metric = score_named(gate_metric(report))
    caption = f"Test {metric.label} against size and latency; hollow: failed. Dashed: what the gate asks for."
    failed = [entry["variant"] for entry in report["compression"] if not entry["passed"]]
    lost = {0: "Every form keeps enough.", 1: f"One form failed: {failed[0] if failed else ''}."}
    said = lost.get(len(failed), f"{len(failed)} forms failed: {', '.join(failed)}.")
    return f"""<h2>Compressed forms</h2>
<p>{text(said)}</p>
{compression_table(report)}
<p class="note">Each form went through the evaluation of the student and is held to the same threshold. Memory: of the
weights as they are held. The forms took turns while they were timed.</p>
{_plots([_figure("compression", inline_svg(compression_plot(report), "compression"), caption)])}"""


def _plots(figures: list[str]) -> str:
    return '<div class="plots">\n' + "\n".join(figures) + "\n</div>"


def _figure(name: str, svg: str, caption: str, attributes: str = "") -> str:
    return f'<figure id="{text(name)}"{attributes}>\n{svg}\n<figcaption>{text(caption)}</figcaption>\n</figure>'
