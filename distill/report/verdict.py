"""What the run came to, in words."""

from dataclasses import dataclass
from typing import Any

from neural_layers.distill.report.numbers import count, percent, score, times

KEPT_FROM = 0.9  # of the teacher's BLEU
WEAK_TEACHER_BLEU = 10.0


@dataclass(frozen=True)
class Verdict:
    """The judgement on the student.

    sentence: one sentence for the top of the page
    status:   `better`, `kept`, `lost`, or `unknown` where the teacher's BLEU is 0
    mark:     the status in words
    remarks:  the sentences that put it into proportion: absolute scores, a weak teacher, the baseline
    """

    sentence: str
    status: str
    mark: str
    remarks: tuple[str, ...]


def judge(report: dict[str, Any]) -> Verdict:
    """The verdict on a report; quality counts as kept from `KEPT_FROM` of the teacher's BLEU on."""
    teacher, student = report["models"]["teacher"], report["models"]["student"]
    teacher_bleu, student_bleu = teacher["quality"]["bleu"], student["quality"]["bleu"]
    kept = report["retention"]["bleu"]
    cost = _cost_phrase(teacher["parameters"], student["parameters"])
    threshold = f"the threshold is {KEPT_FROM:.0%} of the teacher's BLEU".replace("%", " %")
    if kept is None:
        status, mark = "unknown", "Quality kept: cannot be told"
        sentence = (
            f"The teacher's BLEU is 0, so no share of it can be kept; the student reaches {score(student_bleu)} BLEU"
        )
    elif percent(kept) == "100.0":
        status, mark = "kept", f"Quality kept ({threshold})"
        sentence = "The student matches the teacher's BLEU"
    elif kept > 1:
        status, mark = "better", f"Quality kept and exceeded ({threshold})"
        scores = f"{score(student_bleu)} against {score(teacher_bleu)} BLEU, {percent(kept)} %"
        sentence = f"The student is better than the teacher ({scores})"
    elif kept >= KEPT_FROM:
        status, mark = "kept", f"Quality kept ({threshold})"
        sentence = f"The student keeps {percent(kept)} % of the teacher's BLEU"
    else:
        status, mark = "lost", f"Quality not kept ({threshold})"
        # 0.8996 must not read as the 90.0 % that it misses.
        sentence = f"The student keeps only {percent(min(kept, KEPT_FROM - 1e-3))} % of the teacher's BLEU"
    return Verdict(f"{sentence}{cost}.", status, mark, tuple(_remarks(report)))


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


def _remarks(report: dict[str, Any]) -> list[str]:
    models = report["models"]
    teacher, student = models["teacher"]["quality"], models["student"]["quality"]
    kept = report["retention"]["chrf"]
    share = "" if kept is None else f", which is {percent(kept)} % of the teacher's chrF"
    remarks = [
        f"On {count(report['data']['test'])} test sentences the teacher reaches {score(teacher['bleu'])} BLEU and "
        f"{score(teacher['chrf'])} chrF, the student {score(student['bleu'])} BLEU and {score(student['chrf'])} chrF"
        f"{share}."
    ]
    if 0 < teacher["bleu"] < WEAK_TEACHER_BLEU:
        remarks.append("The teacher itself is weak, so keeping its quality says little.")
    if "baseline" in models:
        remarks.append(_baseline_remark(student["bleu"], models["baseline"]["quality"]["bleu"]))
    return remarks


def _baseline_remark(student_bleu: float, baseline_bleu: float) -> str:
    subject = "The same student trained without the teacher"
    gap = score(abs(student_bleu - baseline_bleu))
    if gap == "0.0":
        return f"{subject} reaches the same BLEU: the distillation did not help here."
    if student_bleu > baseline_bleu:
        return f"{subject} reaches {score(baseline_bleu)} BLEU: the distillation gains {gap} BLEU."
    return f"{subject} reaches {score(baseline_bleu)} BLEU: the distillation costs {gap} BLEU."
