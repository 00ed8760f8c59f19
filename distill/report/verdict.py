"""What the run came to, in words."""

from dataclasses import dataclass
from typing import Any

from neural_layers.distill.report.costs import noun
from neural_layers.distill.report.numbers import count, digits, percent, times
from neural_layers.distill.report.scores import gate_metric, is_translation, score_named

KEPT_FROM = 0.9  # of the teacher's score, where the report names no other threshold
WEAK_TEACHER = {"bleu": 10.0}


@dataclass(frozen=True)
class Verdict:
    """The judgement on the student.

    sentence: one sentence for the top of the page
    status:   `better`, `kept`, `lost`, or `unknown` where the teacher's score is 0
    mark:     the status in words
    remarks:  the sentences that put it into proportion: absolute scores, a weak teacher, the baseline, the gate
    """

    sentence: str
    status: str
    mark: str
    remarks: tuple[str, ...]


def judge(report: dict[str, Any]) -> Verdict:
    """The verdict on a report, by the score of its gate: quality counts as kept from `min_retention` of it on.

    Reports without a gate are judged by BLEU or accuracy and `KEPT_FROM`. Where the gate found other scores to be lost,
    quality is not kept, whatever the first score says.
    """
    metric, gate = gate_metric(report), report.get("gate", {})
    shown, least = score_named(metric), gate.get("min_retention", KEPT_FROM)
    teacher, student = (report["models"][name] for name in ("teacher", "student"))
    taught, learned = teacher["quality"][metric], student["quality"][metric]
    kept = report["retention"].get(metric)
    threshold = f"the threshold is {_round(least)} % of the teacher's {shown.label}"
    # A share that cannot be told is no loss that the mark could name.
    untold = [metric] if kept is None else []
    failed = [score_named(name).label for name in gate.get("failed", []) if name not in untold]
    if kept is None:
        status, mark = "unknown", "Quality kept: cannot be told"
        sentence = (
            f"The teacher's {shown.label} is {digits(taught)}, so no share of it can be kept; "
            f"the student reaches {_with_unit(metric, learned)}"
        )
    elif percent(kept) == "100.0":
        status, mark = "kept", f"Quality kept ({threshold})"
        sentence = f"The student matches the teacher's {shown.label}"
    elif kept > 1:
        status, mark = "better", f"Quality kept and exceeded ({threshold})"
        scores = f"{shown.show(learned)} against {_with_unit(metric, taught)}, {percent(kept)} %"
        sentence = f"The student is better than the teacher ({scores})"
    elif kept >= least:
        status, mark = "kept", f"Quality kept ({threshold})"
        sentence = f"The student keeps {percent(kept)} % of the teacher's {shown.label}"
    else:
        status, mark = "lost", f"Quality not kept ({threshold})"
        # 0.8996 must not read as the 90.0 % that it misses.
        sentence = f"The student keeps only {percent(min(kept, least - 1e-3))} % of the teacher's {shown.label}"
    if failed and status != "lost":
        status, mark = "lost", f"Quality not kept: {' and '.join(failed)} ({threshold})"
    cost = _cost_phrase(teacher["parameters"], student["parameters"])
    return Verdict(f"{sentence}{cost}.", status, mark, (*_remarks(report, metric), *gate_remarks(report)))


def gate_remarks(report: dict[str, Any]) -> list[str]:
    """What the gate did while the student was trained, and what it says at the end; nothing without a gate."""
    gate = report.get("gate")
    if not gate:
        return []
    shown, number = score_named(gate["metric"]), len(report.get("rollbacks", []))
    went_back = {0: "nothing was rolled back", 1: "one rollback was made"}.get(number, f"{number} rollbacks were made")
    best = gate.get("best_step")
    said = "" if best is None else f"; the best validation was at step {count(best)}"
    if gate.get("outcome") == "stopped":
        ending = f"The gate stopped the training: {went_back}, as many as it allows{said}, and the student is that one."
    else:
        ending = f"The training ran to its end: {went_back}{said}."
    asked = f"which was to keep {_round(gate['min_retention'])} % of the teacher's quality"
    if gate["passed"]:
        final = f"The gate passed the student, {asked}."
    else:
        names = " and ".join(score_named(name).label for name in gate.get("failed", [])) or shown.label
        final = f"The gate failed the student, {asked}; it fell short in {names}."
    limits = (
        f"The gate goes back where {shown.label} falls by more than {_round(gate['max_drop'])} % of the best and the "
        f"fall is certain to {_round(gate['confidence'])} % in {count(gate['samples'])} bootstrap samples; it stops "
        f"after {count(gate['patience'])} rollbacks."
    )
    return [final, ending, limits]


def _with_unit(metric: str, value: float) -> str:
    shown = score_named(metric)
    return f"{shown.show(value)} {'% ' * (shown.scale == 100)}{shown.label}"


def _round(ratio: float) -> str:
    """A threshold in percent: 0.9 -> "90", 0.975 -> "97.5"."""
    return percent(ratio).removesuffix(".0")


def _cost_phrase(teacher_parameters: int, student_parameters: int) -> str:
    """ " with 4.1 times fewer parameters", or nothing where there is nothing to compare."""
    if not teacher_parameters or not student_parameters:
        return ""
    ratio = teacher_parameters / student_parameters
    if times(ratio) == "1.0" or times(1 / ratio) == "1.0":
        return " with about as many parameters"
    if ratio > 1:
        return f" with {times(ratio)} times fewer parameters"
    return f" with {times(1 / ratio)} times as many parameters"


def _remarks(report: dict[str, Any], metric: str) -> list[str]:
    models = report["models"]
    teacher, student = models["teacher"]["quality"], models["student"]["quality"]
    usual = ("bleu", "chrf") if is_translation(report) else ("accuracy", "macro_f1", "bits_per_byte")
    told = [name for name in dict.fromkeys((metric, *usual)) if name in teacher and name in student]
    reached = {
        name: " and ".join(_with_unit(one, quality[one]) for one in told)
        for name, quality in (("teacher", teacher), ("student", student))
    }
    # The share of the first score stands in the verdict already.
    other = next((name for name in told if name != metric and report["retention"].get(name) is not None), None)
    share = "" if other is None else (
        f", which is {percent(report['retention'][other])} % of the teacher's {score_named(other).label}"
    )  # fmt: skip
    remarks = [
        f"On {count(report['data']['test'])} test {noun(report)}s the teacher reaches {reached['teacher']}, the "
        f"student {reached['student']}{share}."
    ]
    if 0 < teacher[metric] < WEAK_TEACHER.get(metric, 0.0):
        remarks.append("The teacher itself is weak, so keeping its quality says little.")
    if "baseline" in models:
        remarks.append(_baseline_remark(metric, student[metric], models["baseline"]["quality"][metric]))
    return remarks


def _baseline_remark(metric: str, student: float, baseline: float) -> str:
    subject, shown = "The same student trained without the teacher", score_named(metric)
    difference = shown.show(abs(student - baseline))
    unit = f"points of {shown.label}" if shown.scale == 100 else shown.label
    if float(difference) == 0:
        return f"{subject} reaches the same {shown.label}: the distillation did not help here."
    helps = (student < baseline) == (shown.better == "lower")
    return (
        f"{subject} reaches {_with_unit(metric, baseline)}: the distillation {'gains' if helps else 'costs'} "
        f"{difference} {unit}."
    )
