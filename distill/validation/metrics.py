"""How good translations are: BLEU, chrF, TER, ROUGE, BERTScore, exact matches, length."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass

import numpy as np
from numpy.typing import ArrayLike

from neural_layers.distill.validation import corpus_scores
from neural_layers.distill.validation.bertscore import BertScore
from neural_layers.distill.validation.measures import Measure, mean_measure, quotient
from neural_layers.distill.validation.recording import scores
from neural_layers.distill.validation.words import target_tokenizer, words

_ROUGE = ("rouge1", "rouge2", "rougeL")
NO_BERTSCORE = "left out: no encoder folder was given (--bertscore DIR)"


@dataclass(frozen=True)
class Quality:
    """Corpus scores.

    In percent: BLEU, chrF, TER (lower is better), ROUGE, BERTScore; the share of exact matches, 0 … 1; and the words of
    the hypotheses for each word of the references.
    """

    bleu: float
    chrf: float
    ter: float
    rouge1: float
    rouge2: float
    rougeL: float
    exact_match: float
    length_ratio: float
    bertscore: float | None = None

    def as_dict(self) -> dict[str, float]:
        """By name; BERTScore is missing where it was not computed."""
        return {name: value for name, value in asdict(self).items() if value is not None}


class TranslationScorer:
    """Scores translations of the same sentences.

    bleu, chrf, ter: sacrebleu's, with its defaults. ter counts the words that the tokenizer of BLEU finds where the
                     language has no spaces
    rouge1, …, L:    the mean over sentences of rouge-score's F1, on the words of `words.words`: its own tokenizer drops
                     every letter that is not ASCII
    length_ratio:    words of the hypotheses over words of the references, as BLEU counts them
    bertscore:       where an encoder is given

    references: one for each sentence
    language:   of the references (`words.target_tokenizer`); needed where it is written without spaces
    Raises ValueError where there are no references, InputError for a language whose words cannot be found.
    """

    def __init__(
        self, references: Sequence[str], language: str | None = None, encoder: BertScore | None = None
    ) -> None:
        from rouge_score.rouge_scorer import RougeScorer
        from sacrebleu.metrics import BLEU, CHRF, TER

        if not references:
            raise ValueError("no references; expected one for each hypothesis, and one at least")
        self.references, self.encoder = list(references), encoder
        tokenizer = target_tokenizer(self.references, language)
        bleu = BLEU(tokenize=tokenizer, references=[self.references])
        # sacrebleu's TER splits at spaces alone.
        self._spaced = str if tokenizer == "13a" else bleu.tokenizer
        ter = TER(references=[[self._spaced(text) for text in self.references]])
        self._metrics = {"bleu": bleu, "chrf": CHRF(references=[self.references]), "ter": ter}
        self._rouge = RougeScorer(_ROUGE, tokenizer=_UnicodeWords())

    def measures(self, hypotheses: Sequence[str], bertscore: ArrayLike | None = None) -> dict[str, Measure]:
        """The measures by name.

        bertscore: (n,) those of an earlier call, so that the encoder need not run again
        Raises ValueError where there are not as many hypotheses as references.
        """
        if len(hypotheses) != len(self.references):
            raise ValueError(f"{len(hypotheses)} hypotheses for {len(self.references)} references; expected as many")
        hypotheses, spaced = list(hypotheses), [self._spaced(text) for text in hypotheses]
        texts = {"bleu": hypotheses, "chrf": hypotheses, "ter": spaced}
        counts = {
            name: np.array(metric._extract_corpus_statistics(texts[name], None), dtype=np.float64)
            for name, metric in self._metrics.items()
        }
        rouge = [self._rouge.score(r, h) for h, r in zip(hypotheses, self.references, strict=True)]
        exact = [h == r for h, r in zip(hypotheses, self.references, strict=True)]
        found = [
            Measure("bleu", counts["bleu"], corpus_scores.bleu),
            Measure("chrf", counts["chrf"], corpus_scores.chrf),
            Measure("ter", counts["ter"], corpus_scores.ter, higher_is_better=False),
            *(mean_measure(name, [100 * scores[name].fmeasure for scores in rouge]) for name in _ROUGE),
            mean_measure("exact_match", exact),
            Measure("length_ratio", counts["bleu"][:, :2], quotient),
        ]
        if bertscore is None and self.encoder is not None:
            # Rounded as the records have it, so that a measure out of a record is the same.
            bertscore = self.encoder.f1(hypotheses, self.references).round(6)
        if bertscore is not None:
            found.append(mean_measure("bertscore", bertscore))
        return {measure.name: measure for measure in found}


class _UnicodeWords:
    """`words` as rouge-score wants a tokenizer."""

    def tokenize(self, text: str) -> list[str]:
        return words(text)


def translation_quality(
    hypotheses: Sequence[str],
    references: Sequence[str],
    language: str | None = None,
    encoder: BertScore | None = None,
) -> Quality:
    """Score hypotheses against one reference each, as `TranslationScorer` does.

    Raises ValueError where the numbers of sentences differ or are zero.
    """
    if len(hypotheses) != len(references) or not references:
        raise ValueError(f"{len(hypotheses)} hypotheses for {len(references)} references; expected as many, and one")
    return Quality(**scores(TranslationScorer(references, language, encoder).measures(hypotheses)))
