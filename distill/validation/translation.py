"""Translating sentences with a model, and validating it by that."""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from neural_layers.distill.data.pairs import SentencePair
from neural_layers.distill.validation.analysis import analyse, worst
from neural_layers.distill.validation.bertscore import BertScore
from neural_layers.distill.validation.measures import Measure
from neural_layers.distill.validation.metrics import NO_BERTSCORE, TranslationScorer
from neural_layers.distill.validation.recording import RecordingValidator, Resampling, digest, fingerprint


@torch.no_grad()
def translate(
    model: Any, tokenizer: Any, sentences: Sequence[str], *, batch_size: int = 64, num_beams: int = 1
) -> list[str]:
    """Translate, greedily or by beams, in batches of like length; the order of `sentences` is kept.

    model: a transformers encoder-decoder with `generate`. tokenizer: its tokenizer.
    A translation may be twice as long as its source and 16 tokens more, within the model's length. A source over that
    length is cut, with a warning. Dropout is off while it runs.
    """
    was_training = model.training
    model.eval()
    order = sorted(range(len(sentences)), key=lambda i: len(sentences[i]))
    limit, translations = model.config.max_position_embeddings, [""] * len(sentences)
    for start in range(0, len(order), batch_size):
        rows = order[start : start + batch_size]
        batch = tokenizer(
            [sentences[i] for i in rows], return_tensors="pt", padding=True, truncation=True, max_length=limit
        )
        cut = sum(bool(encoding.overflowing) for encoding in batch.encodings)
        if cut:
            warnings.warn(f"{cut} sentences are longer than the model's {limit} tokens and are cut", stacklevel=2)
        source, mask = batch["input_ids"].to(model.device), batch["attention_mask"].to(model.device)
        longest = min(2 * source.shape[1] + 16, limit - 1)
        output = model.generate(source, attention_mask=mask, max_new_tokens=longest, num_beams=num_beams)
        for i, text in zip(rows, tokenizer.batch_decode(output, skip_special_tokens=True), strict=True):
            translations[i] = text
    model.train(was_training)
    return translations


@dataclass(frozen=True)
class TranslationOptions:
    """How translations are scored and analysed.

    language:     of the references; needed where it is written without spaces
    encoder:      for BERTScore, which is left out without one
    seen:         how often each word stands in the training sources (`words.word_counts`), for the analysis
    rare_at_most: words seen so often or less are rare
    worst:        how many of the worst sentences are shown
    compared:     the metrics that are compared with earlier validations
    resampling:   how
    """

    language: str | None = None
    encoder: BertScore | None = None
    seen: Mapping[str, int] | None = None
    rare_at_most: int = 3
    worst: int = 5
    compared: tuple[str, ...] = ("bleu", "chrf")
    resampling: Resampling = field(default_factory=Resampling)


class TranslationValidator(RecordingValidator):
    """Scores a model on sentence pairs, beside its teacher; keeps and compares validations as `RecordingValidator`.

    The teacher translates once: `folder/teacher.json` keeps its translations, for runs that are taken up again, and is
    used where the sentences, the teacher and the way of decoding are the same. Beside what every validation has, a file
    holds the `analysis` of errors, the `worst` sentences side by side, and all `translations`.

    Raises ValueError without pairs, InputError for a language whose words cannot be found.
    """

    def __init__(
        self,
        pairs: Sequence[SentencePair],
        tokenizer: Any,
        folder: Path,
        *,
        teacher: nn.Module | None = None,
        batch_size: int = 64,
        num_beams: int = 1,
        options: TranslationOptions | None = None,
    ) -> None:
        self.options = options or TranslationOptions()
        self.sources, self.references = [p.source for p in pairs], [p.target for p in pairs]
        super().__init__(
            folder, digest([*self.sources, *self.references]), self.options.compared, self.options.resampling
        )
        self.tokenizer, self.teacher, self.batch_size, self.num_beams = tokenizer, teacher, batch_size, num_beams
        self.scorer = TranslationScorer(self.references, self.options.language, self.options.encoder)
        self._teachers: tuple[list[str], dict[str, Measure]] | None = None

    def validate(self, model: nn.Module) -> tuple[dict[str, Any], dict[str, Measure], dict[str, Measure] | None]:
        translations = {"student": self._translate(model)}
        measures = {"student": self.scorer.measures(translations["student"])}
        if self.teacher is not None:
            translations["teacher"], measures["teacher"] = self._teacher(self.teacher)
        chrf = {name: found["chrf"] for name, found in measures.items()}
        options, shown = self.options, (self.sources, self.references, translations, chrf)
        details = {
            "sentences": len(self.sources),
            "bertscore": self._bertscore(),
            "analysis": analyse(*shown, options.seen, options.rare_at_most),
            "worst": worst(*shown, options.worst, by="student"),
            **_kept(translations["student"], measures["student"]),
        }
        return details, measures["student"], measures.get("teacher")

    def restore(self, record: dict[str, Any]) -> dict[str, Measure]:
        return self.scorer.measures(record["translations"], record.get("bertscores"))

    def _translate(self, model: nn.Module) -> list[str]:
        return translate(model, self.tokenizer, self.sources, batch_size=self.batch_size, num_beams=self.num_beams)

    def _translated(self, model: nn.Module) -> dict[str, Any]:
        translations = self._translate(model)
        return _kept(translations, self.scorer.measures(translations))

    def _bertscore(self) -> Any:
        encoder = self.options.encoder
        return {"encoder": str(encoder.folder), "num_layers": encoder.num_layers} if encoder else NO_BERTSCORE

    def _teacher(self, teacher: nn.Module) -> tuple[list[str], dict[str, Measure]]:
        """The teacher's translations and their measures, out of its file where that has them."""
        if self._teachers is None:
            made_by = {
                "data": self.data,
                "teacher": fingerprint(teacher),
                "num_beams": self.num_beams,
                "bertscore": self._bertscore(),
            }
            kept = self.teacher_record(made_by, lambda: self._translated(teacher))
            measures = self.scorer.measures(kept["translations"], kept.get("bertscores"))
            self._teachers = kept["translations"], measures
        return self._teachers


def _kept(translations: list[str], measures: dict[str, Measure]) -> dict[str, Any]:
    """What restores the measures: the translations, and the scores that need another model."""
    kept: dict[str, Any] = {"translations": translations}
    if "bertscore" in measures:
        kept["bertscores"] = measures["bertscore"].per_example().tolist()
    return kept


def ratio(student: float, teacher: float) -> float | None:
    """student / teacher, None where the teacher has nothing to keep."""
    return round(student / teacher, 4) if teacher > 0 else None
