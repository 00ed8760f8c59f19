"""Translating sentences with a model, and validating it by that."""

import time
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from neural_layers.distill.data.pairs import SentencePair
from neural_layers.distill.files import save_json
from neural_layers.distill.validation.metrics import Quality, sentence_chrf, translation_quality


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


class TranslationValidator:
    """Scores a model on sentence pairs and keeps each validation as `folder/step-N.json`.

    Called as `validate(model, step)` it returns the model's scores. The file holds them, those of the teacher on the
    same sentences (where one is given), their ratio, and the `worst` sentences by chrF.
    """

    def __init__(
        self,
        pairs: Sequence[SentencePair],
        tokenizer: Any,
        folder: Path,
        *,
        teacher: nn.Module | None = None,
        batch_size: int = 64,
        worst: int = 5,
    ) -> None:
        self.sources, self.references = [p.source for p in pairs], [p.target for p in pairs]
        self.tokenizer, self.folder, self.teacher = tokenizer, folder, teacher
        self.batch_size, self.worst = batch_size, worst
        self.history: list[dict[str, float]] = []
        self._teacher_quality: Quality | None = None

    def __call__(self, model: nn.Module, step: int) -> dict[str, float]:
        started = time.perf_counter()
        hypotheses = translate(model, self.tokenizer, self.sources, batch_size=self.batch_size)
        scores = translation_quality(hypotheses, self.references).as_dict()
        record: dict[str, Any] = {"step": step, "sentences": len(self.sources), "model": scores}
        teacher = self._score_teacher()
        if teacher is not None:
            record["teacher"] = teacher.as_dict()
            record["retention"] = {k: ratio(scores[k], record["teacher"][k]) for k in ("bleu", "chrf")}
        record["worst"] = self._worst(hypotheses)
        record["seconds"] = round(time.perf_counter() - started, 3)
        save_json(self.folder / f"step-{step}.json", record)
        self.history.append({"step": step, **scores})
        return scores

    def _score_teacher(self) -> Quality | None:
        if self.teacher is not None and self._teacher_quality is None:
            hypotheses = translate(self.teacher, self.tokenizer, self.sources, batch_size=self.batch_size)
            self._teacher_quality = translation_quality(hypotheses, self.references)
        return self._teacher_quality

    def _worst(self, hypotheses: list[str]) -> list[dict[str, Any]]:
        scores = [sentence_chrf(h, r) for h, r in zip(hypotheses, self.references, strict=True)]
        rows = sorted(range(len(scores)), key=scores.__getitem__)[: self.worst]
        return [
            {
                "source": self.sources[i],
                "reference": self.references[i],
                "model": hypotheses[i],
                "chrf": round(scores[i], 2),
            }
            for i in rows
        ]


def ratio(student: float, teacher: float) -> float | None:
    """student / teacher, None where the teacher has nothing to keep."""
    return round(student / teacher, 4) if teacher > 0 else None
