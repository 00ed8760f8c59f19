"""Teacher, student and baseline on the test text: the parts of the report that need the models."""

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import nn
from tqdm.auto import tqdm

from neural_layers.distill.compression import Threshold, measure_compressed
from neural_layers.distill.gate import QualityGate
from neural_layers.distill.recipes.described import described_models, described_retention
from neural_layers.distill.recipes.distill_lm_compression import check_forms, compress_language_model, reader
from neural_layers.distill.recipes.distill_lm_validation import COMPARED, LanguageTest, worst_windows
from neural_layers.distill.recipes.trained import Trained
from neural_layers.distill.text.packing import Packed
from neural_layers.distill.validation.measures import Array, Measure, quotient
from neural_layers.distill.validation.recording import scores
from neural_layers.timing import measure_latency, measure_throughput

_TIMED, _BATCHED, _WORST, _RANDOM, _SHOWN = 50, 128, 6, 4, 300


@dataclass(frozen=True)
class Tested:
    """What the models make of the test text: sums of its windows and measures, by the model's name."""

    test: LanguageTest
    sums: dict[str, Array]
    measures: dict[str, dict[str, Measure]]

    @classmethod
    def of(cls, models: Mapping[str, nn.Module], test: LanguageTest) -> "Tested":
        """Let each model read the text."""
        sums = {name: test.sums(model) for name, model in tqdm(models.items(), desc="test", unit="model")}
        return cls(test, sums, {name: test.measures(found) for name, found in sums.items()})


def compare(
    models: Mapping[str, nn.Module],
    trained: Mapping[str, Trained],
    tested: Tested,
    tokenizer: Any,
    folders: Mapping[str, Path],
    gate: QualityGate,
) -> dict[str, Any]:
    """The parts `models`, `retention`, `retention_interval` and `examples` of the report.

    folders: where the weights of each model lie. Latency is that of one window; throughput counts windows.
    """
    windows = tested.test.windows
    read = {name: reader(model, tested.test) for name, model in models.items()}
    latency = measure_latency({name: _one(ask) for name, ask in read.items()}, windows[:_TIMED])
    throughput = measure_throughput(read, windows[:_BATCHED], batch_size=tested.test.batch_size)
    student, teacher = tested.measures["student"], tested.measures["teacher"]
    return {
        "models": described_models(models, folders, tested.measures, trained, latency, throughput),
        **described_retention(student, teacher, COMPARED, samples=gate.samples, confidence=gate.confidence),
        "examples": _examples(tested, tokenizer),
    }


def compressed(
    student: nn.Module, tokenizer: Any, variants: str, folder: Path, tested: Tested, gate: QualityGate
) -> list[dict[str, Any]]:
    """The part `compression` of the report; the forms are saved in `folder`/compressed."""
    test = tested.test
    forms = compress_language_model(student, tokenizer, check_forms(variants), folder, test, tqdm.write)
    examples: Any = test.windows[:_TIMED]  # they are handed on to `predict`, whatever they are
    return measure_compressed(
        forms,
        lambda predict: test.measures(predict(test.windows)),  # type: ignore[arg-type]
        Threshold(COMPARED, gate.min_retention),
        teacher=scores(tested.measures["teacher"]),
        student=scores(tested.measures["student"]),
        examples=examples,
        tell=tqdm.write,
    )


def _one(ask: Callable[[Sequence[Packed]], Any]) -> Callable[[Packed], Any]:
    return lambda window: ask([window])


def _examples(tested: Tested, tokenizer: Any) -> list[dict[str, Any]]:
    """The windows on which the student loses most against its teacher, and some at random."""
    windows, sums = tested.test.windows, tested.sums
    worst = list(worst_windows(sums["student"], sums["teacher"], _WORST))
    others = [i for i in range(len(windows)) if i not in worst]
    chosen = random.Random(0).sample(others, min(_RANDOM, len(others)))
    losses = {name: quotient(found) for name, found in sums.items()}
    shown = []
    for kind, i in [*(("worst", i) for i in worst), *(("random", i) for i in chosen)]:
        text = tokenizer.decode(np.asarray(windows[i].input_ids).tolist())
        text = text if len(text) <= _SHOWN else text[:_SHOWN] + " …"
        shown.append({"kind": kind, "text": text, **{name: round(float(of[i]), 4) for name, of in losses.items()}})
    return shown
