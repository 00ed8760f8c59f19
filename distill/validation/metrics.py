"""How good translations are, by sacrebleu."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True)
class Quality:
    """Corpus scores: BLEU, chrF and TER in percent (TER: lower is better), and the share of exact matches, 0 … 1."""

    bleu: float
    chrf: float
    ter: float
    exact_match: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def translation_quality(hypotheses: Sequence[str], references: Sequence[str]) -> Quality:
    """Score hypotheses against one reference each with sacrebleu's defaults (13a tokens, chrF2, TER).

    Raises ValueError where the numbers of sentences differ or are zero.
    """
    from sacrebleu.metrics import BLEU, CHRF, TER

    if len(hypotheses) != len(references) or not references:
        raise ValueError(f"{len(hypotheses)} hypotheses for {len(references)} references; expected as many, and one")
    bleu, chrf, ter = (
        round(metric.corpus_score(hypotheses, [references]).score, 4) for metric in (BLEU(), CHRF(), TER())
    )
    exact = sum(h == r for h, r in zip(hypotheses, references, strict=True)) / len(references)
    return Quality(bleu, chrf, ter, exact)


def sentence_chrf(hypothesis: str, reference: str) -> float:
    """chrF of one sentence, in percent."""
    from sacrebleu.metrics import CHRF

    return CHRF().sentence_score(hypothesis, [reference]).score
