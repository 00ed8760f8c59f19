"""Teacher and student side by side: quality, size, latency."""

import random
import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from neural_layers.distill.data.pairs import SentencePair
from neural_layers.distill.recipes.training import TrainedModel
from neural_layers.distill.validation import translate, translation_quality
from neural_layers.distill.validation.metrics import sentence_chrf
from neural_layers.distill.validation.translation import ratio

_TIMED_SENTENCES, _WORST, _RANDOM = 30, 5, 7


def compare(
    models: Mapping[str, nn.Module],
    trained: dict[str, TrainedModel],
    tokenizer: Any,
    test: list[SentencePair],
    folders: dict[str, Path],
) -> dict[str, Any]:
    """The parts `models`, `retention` and `examples` of the report, on the test pairs.

    folders: where the weights of each model lie.
    """
    sources, references = [p.source for p in test], [p.target for p in test]
    translations = {}
    for name, model in tqdm(models.items(), desc="test", unit="model"):
        model.eval()
        translations[name] = translate(model, tokenizer, sources)
    quality = {name: translation_quality(texts, references).as_dict() for name, texts in translations.items()}
    latency = _latencies(models, tokenizer, sources[:_TIMED_SENTENCES])
    return {
        "models": {
            name: {
                "parameters": sum(p.numel() for p in model.parameters()),
                "file_bytes": sum(file.stat().st_size for file in folders[name].glob("*.safetensors")),
                "memory_bytes": sum(t.nbytes for t in [*model.parameters(), *model.buffers()]),
                "latency_ms": latency[name],
                "quality": quality[name],
                "training": {"steps": trained[name].steps, "seconds": trained[name].seconds}
                if name in trained
                else None,
            }
            for name, model in models.items()
        },
        "retention": {m: ratio(quality["student"][m], quality["teacher"][m]) for m in ("bleu", "chrf")},
        "examples": _examples(test, translations),
    }


def _latencies(models: Mapping[str, nn.Module], tokenizer: Any, sentences: list[str]) -> dict[str, dict[str, float]]:
    """Milliseconds to translate one sentence, greedily; the models take turns, so that a busy machine slows all."""
    times: dict[str, list[float]] = {name: [] for name in models}
    for sentence in [sentences[0], *sentences]:
        for name, model in models.items():
            started = time.perf_counter()
            translate(model, tokenizer, [sentence])
            times[name].append((time.perf_counter() - started) * 1000)
    # The first sentence warms up and is left out.
    return {name: {"p50": _quantile(t[1:], 0.5), "p95": _quantile(t[1:], 0.95)} for name, t in times.items()}


def _quantile(values: list[float], share: float) -> float:
    if len(values) == 1:
        return round(values[0], 2)
    return round(statistics.quantiles(values, n=100, method="inclusive")[round(share * 100) - 1], 2)


def _examples(test: list[SentencePair], translations: dict[str, list[str]]) -> list[dict[str, Any]]:
    scores = [sentence_chrf(h, p.target) for h, p in zip(translations["student"], test, strict=True)]
    worst = sorted(range(len(test)), key=scores.__getitem__)[:_WORST]
    others = [i for i in range(len(test)) if i not in worst]
    chosen = random.Random(0).sample(others, min(_RANDOM, len(others)))
    return [
        {
            "kind": "worst" if i in worst else "random",
            "source": test[i].source,
            "reference": test[i].target,
            "teacher": translations["teacher"][i],
            "student": translations["student"][i],
            "student_chrf": round(scores[i], 1),
        }
        for i in [*worst, *chosen]
    ]
