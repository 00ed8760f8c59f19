"""The scores that reports know: what each is called, in which unit it is shown, and which direction is better."""

from dataclasses import dataclass
from typing import Any

from neural_layers.distill.report.numbers import digits

NOT_SCORES = ("step", "epoch", "seconds", "loss_weight")


@dataclass(frozen=True)
class Score:
    """How a score is shown.

    label:  its name in words
    scale:  what its values are multiplied by: 100 for shares, which are shown in percent
    better: "higher", "lower", or "one" where 1 is best
    decimals: behind the point; None for three significant digits
    """

    label: str
    scale: float = 1.0
    better: str = "higher"
    decimals: int | None = 1

    @property
    def header(self) -> str:
        """Its name with its unit and, where more is not better, what is."""
        unit = ", %" if self.scale == 100 else ""
        return self.label + unit + {"higher": "", "lower": " (lower is better)", "one": " (1 is best)"}[self.better]

    def show(self, value: float) -> str:
        """A value without its unit."""
        scaled = self.scale * value
        return digits(scaled) if self.decimals is None else f"{scaled:.{self.decimals}f}"


SCORES = {
    "bleu": Score("BLEU"),
    "chrf": Score("chrF"),
    "ter": Score("TER", better="lower"),
    "rouge1": Score("ROUGE-1"),
    "rouge2": Score("ROUGE-2"),
    "rougeL": Score("ROUGE-L"),
    "bertscore": Score("BERTScore"),
    "exact_match": Score("exact match", 100),
    "length_ratio": Score("length ratio", better="one", decimals=2),
    "accuracy": Score("accuracy", 100),
    "macro_f1": Score("macro-F1", 100),
    "calibration_error": Score("calibration error", 100, "lower"),
    "loss": Score("loss", 1, "lower", 4),
    "perplexity": Score("perplexity", 1, "lower", None),
    "bits_per_byte": Score("bits per byte", 1, "lower", 4),
}


def score_named(name: str) -> Score:
    """The score of that name; one that reports do not know is shown as it comes."""
    return SCORES.get(name, Score(name.replace("_", " "), decimals=None))


def is_translation(report: dict[str, Any]) -> bool:
    """Whether a translator was distilled; reports without a task are of translators."""
    return bool(report.get("task", "translation") == "translation")


def is_language(report: dict[str, Any]) -> bool:
    """Whether a causal language model was distilled."""
    return bool(report.get("task") == "language")


def gate_metric(report: dict[str, Any]) -> str:
    """The score that the student is judged by: the gate's, or BLEU, loss or accuracy where none is named."""
    usual = "bleu" if is_translation(report) else "loss" if is_language(report) else "accuracy"
    return str(report.get("gate", {}).get("metric") or usual)


def scores_of(entries: list[dict[str, Any]], first: str = "") -> list[str]:
    """The names of all scores in entries, known ones in the order of `SCORES`; `first` comes first."""
    found = dict.fromkeys(
        name
        for entry in entries
        for name, value in entry.items()
        if name not in NOT_SCORES and isinstance(value, int | float) and not isinstance(value, bool)
    )
    order = [first, *SCORES]
    return sorted(found, key=lambda name: order.index(name) if name in order else len(order))
