"""Teacher, student and baseline on the test sentences: the parts of the report that need the models."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from neural_layers.distill.compression import Threshold, compress, measure_compressed, predictor
from neural_layers.distill.data.pairs import SentencePair
from neural_layers.distill.gate import QualityGate
from neural_layers.distill.recipes.described import described_models, described_retention
from neural_layers.distill.recipes.trained import Trained
from neural_layers.distill.validation import (
    Measure,
    TranslationOptions,
    TranslationScorer,
    translate,
)
from neural_layers.distill.validation.analysis import analyse, worst
from neural_layers.distill.validation.recording import scores
from neural_layers.timing import measure_latency, measure_throughput

RETAINED = ("bleu", "chrf")
_TIMED, _BATCHED, _WORST, _RANDOM = 100, 256, 5, 7


@dataclass(frozen=True)
class Tested:
    """What the models make of the test sentences: translations and measures, by the model's name."""

    sources: list[str]
    references: list[str]
    translations: dict[str, list[str]]
    measures: dict[str, dict[str, Measure]]
    scorer: TranslationScorer


def translate_test(
    models: Mapping[str, nn.Module], tokenizer: Any, test: Sequence[SentencePair], options: TranslationOptions
) -> Tested:
    """Let each model translate the test sentences."""
    sources, references = [p.source for p in test], [p.target for p in test]
    scorer = TranslationScorer(references, options.language, options.encoder)
    translations = {}
    for name, model in tqdm(models.items(), desc="test", unit="model"):
        model.eval()
        translations[name] = translate(model, tokenizer, sources)
    measures = {name: scorer.measures(texts) for name, texts in translations.items()}
    return Tested(sources, references, translations, measures, scorer)


def compare(
    models: Mapping[str, nn.Module],
    trained: Mapping[str, Trained],
    tested: Tested,
    tokenizer: Any,
    options: TranslationOptions,
    folders: Mapping[str, Path],
) -> dict[str, Any]:
    """The parts `models`, `retention`, `retention_interval`, `analysis` and `examples` of the report.

    folders: where the weights of each model lie.
    """
    ask = {name: predictor(model, tokenizer, "translation") for name, model in models.items()}
    latency = measure_latency({name: _one(predict) for name, predict in ask.items()}, tested.sources[:_TIMED])
    throughput = measure_throughput(ask, tested.sources[:_BATCHED])
    measures, again = tested.measures, asdict(options.resampling)
    chrf = {name: found["chrf"] for name, found in measures.items()}
    shown = (tested.sources, tested.references, tested.translations, chrf)
    return {
        "models": described_models(models, folders, measures, trained, latency, throughput),
        **described_retention(measures["student"], measures["teacher"], RETAINED, **again),
        "analysis": analyse(*shown, options.seen, options.rare_at_most),
        "examples": _examples(tested, chrf),
    }


def compressed(
    student: nn.Module, tokenizer: Any, variants: str, folder: Path, tested: Tested, gate: QualityGate
) -> list[dict[str, Any]]:
    """The part `compression` of the report; the forms are saved in `folder`/compressed."""

    def evaluate(predict: Callable[[Sequence[str]], Any]) -> dict[str, Measure]:
        return tested.scorer.measures(predict(tested.sources))

    forms = compress(
        student,
        tokenizer,
        variants,
        folder / "compressed",
        "translation",
        student_folder=folder / "student",
        tell=tqdm.write,
    )
    return measure_compressed(
        forms,
        evaluate,
        Threshold(RETAINED, gate.min_retention),
        teacher=scores(tested.measures["teacher"]),
        student=scores(tested.measures["student"]),
        examples=tested.sources[:_TIMED],
        tell=tqdm.write,
    )


def _one(ask: Callable[[Sequence[str]], Any]) -> Callable[[str], Any]:
    return lambda text: ask([text])


def _examples(tested: Tested, chrf: Mapping[str, Measure]) -> list[dict[str, Any]]:
    """The student's worst sentences, and some at random."""
    shown = (tested.sources, tested.references, tested.translations, chrf)
    everything = worst(*shown, len(tested.sources), by="student")
    rest = everything[_WORST:]
    chosen = random.Random(0).sample(rest, min(_RANDOM, len(rest)))
    kinds = [("worst", entry) for entry in everything[:_WORST]] + [("random", entry) for entry in chosen]
    return [{"kind": kind, **entry} for kind, entry in kinds]
