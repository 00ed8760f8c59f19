"""What is quantized: a language model, a translator or a classifier, with its data and its scores."""

import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from neural_layers.distill.classification.data import Fields, LabelledTexts, read_texts
from neural_layers.distill.classification.examples import TextCollator, TextExamples
from neural_layers.distill.compression import predictor
from neural_layers.distill.data.batches import TranslationCollator, TranslationDataset
from neural_layers.distill.data.pairs import SentencePair, read_pairs
from neural_layers.distill.recipes.distill_lm_teacher import TransformersTeacher, load_transformers, packs_documents
from neural_layers.distill.recipes.distill_lm_validation import LanguageTest
from neural_layers.distill.recipes.loading import load_teacher as load_translator
from neural_layers.distill.recipes.ntmm_models import load_classifier
from neural_layers.distill.text.reading import ReadingOptions
from neural_layers.distill.text.sampling import check_length
from neural_layers.distill.text.sources import parse_sources
from neural_layers.distill.text.store import TokenStore, default_cache, open_store
from neural_layers.distill.validation.class_scores import Predictions, class_measures
from neural_layers.distill.validation.language import batched, windows
from neural_layers.distill.validation.metrics import TranslationScorer
from neural_layers.distill.validation.translation import translate
from neural_layers.errors import InputError
from neural_layers.models.loading import check_vocabulary, load_language_model, load_tokenizer, model_type

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Data:
    """What the options say of data.

    measured: a file, or for a language model any source. rows: of a batch. limit: sentences or texts of `measured`, at
    most, and None for all. context: tokens of a language model's sequence, None for 256 or the most that it takes
    """

    measured: str
    calibration: str | None
    calibration_rows: int = 64
    rows: int = 8
    limit: int | None = None
    context: int | None = None
    cache: Path | None = None


@dataclass(frozen=True)
class Subject:
    """A loaded model that can be measured.

    inputs: batches of the measured data. calibration: batches of the calibration data, empty without any.
    metric: its scores. score: the one to keep, more is better. scored: what that is
    """

    model: Any
    tokenizer: Any
    inputs: list[Batch]
    calibration: list[Batch]
    metric: Callable[[nn.Module], dict[str, float]]
    score: Callable[[nn.Module], float]
    scored: str


def load_subject(folder: Path, data: Data) -> Subject:
    """The model in `folder` with its data. Raises InputError for what a person can mend."""
    for name, value in (("--calibration-rows", data.calibration_rows), ("--batch", data.rows), ("--limit", data.limit)):
        if value is not None and value < 1:
            raise InputError(f"{name} {value} must be at least 1")
    kind = model_type(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    architecture = (config.get("architectures") or [""])[0]
    if config.get("quantization_config"):
        raise InputError(f"the model in {folder} is quantized already; give the float model")
    if kind == "cvm":
        return _translator(folder, data)
    if architecture.endswith("ForSequenceClassification"):
        return _classifier(folder, data)
    if kind == "neural_hybrid" or architecture.endswith(("ForCausalLM", "LMHeadModel")):
        return _language_model(folder, data)
    raise InputError(
        f"{folder} holds a {architecture or kind}; quantize takes CVM translators, and models whose class ends in "
        "ForCausalLM or ForSequenceClassification"
    )


def _translator(folder: Path, data: Data) -> Subject:
    model, tokenizer = load_translator(folder)
    limit = model.config.max_position_embeddings
    pairs = _pairs(data.measured, data.limit)
    scorer = TranslationScorer([pair.target for pair in pairs])

    def batches(given: list[SentencePair], rows: int) -> list[Batch]:
        dataset = TranslationDataset(given, tokenizer, limit)
        collate, chosen = TranslationCollator(tokenizer), list(range(min(len(dataset), rows)))
        return [collate([dataset[i] for i in chosen[at : at + data.rows]]) for at in range(0, len(chosen), data.rows)]

    def metric(asked: nn.Module) -> dict[str, float]:
        found = scorer.measures(translate(asked, tokenizer, [pair.source for pair in pairs]))
        return {name: float(found[name].value) for name in ("bleu", "chrf")}

    calibration = [] if data.calibration is None else _pairs(data.calibration, None)
    return Subject(
        model.eval(),
        tokenizer,
        batches(pairs, 8 * data.rows),
        batches(calibration, data.calibration_rows) if calibration else [],
        metric,
        lambda asked: metric(asked)["chrf"],
        "chrF",
    )


def _pairs(path: str, limit: int | None) -> list[SentencePair]:
    return read_pairs(path)[:limit]


def _classifier(folder: Path, data: Data) -> Subject:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    classes = [str(name) for _, name in sorted(config.get("id2label", {}).items(), key=lambda item: int(item[0]))]
    tokenizer = load_tokenizer(folder)
    model = load_classifier(folder, classes, new_head=False)
    longest = min(getattr(model.config, "max_position_embeddings", None) or 512, tokenizer.model_max_length)

    def texts(path: str, limit: int | None) -> LabelledTexts:
        found = read_texts(Path(path), classes, Fields())
        return LabelledTexts(found.texts[:limit], found.labels[:limit], found.sources[:limit])

    def batches(found: LabelledTexts, rows: int) -> list[Batch]:
        examples = TextExamples(found.texts[:rows], found.labels[:rows], tokenizer, longest)
        collate = TextCollator(tokenizer)
        made = [collate([examples[i] for i in range(at, min(at + data.rows, len(examples)))])
                for at in range(0, len(examples), data.rows)]  # fmt: skip
        return [{name: value for name, value in batch.items() if name != "labels"} for batch in made]

    measured = texts(data.measured, data.limit)
    labels = np.array(measured.labels)

    def metric(asked: nn.Module) -> dict[str, float]:
        predictions = Predictions.of(predictor(asked, tokenizer, "classification")(measured.texts), labels)
        found = class_measures(predictions, labels, len(classes))
        return {name: float(found[name].value) for name in ("accuracy", "macro_f1")}

    return Subject(
        model.eval(),
        tokenizer,
        batches(measured, 8 * data.rows),
        [] if data.calibration is None else batches(texts(data.calibration, None), data.calibration_rows),
        metric,
        lambda asked: metric(asked)["accuracy"],
        "accuracy",
    )


def _language_model(folder: Path, data: Data) -> Subject:
    own = model_type(folder) == "neural_hybrid"
    if own:
        model, tokenizer = load_language_model(folder)
        packing = True
    else:
        model, tokenizer = load_transformers(folder).eval(), load_tokenizer(folder)
        check_vocabulary(tokenizer, model.config.vocab_size, folder)
        packing = packs_documents(model)
    longest = getattr(model.config, "max_position_embeddings", None) or 256
    context = min(256, longest) if data.context is None else data.context
    if not 2 <= context <= longest:
        raise InputError(f"--context {context} must lie between 2 and {longest}, the longest that the model takes")
    names = ("input_ids", "seq_idx", "position_ids") if own else ("input_ids",)

    def store(source: str) -> TokenStore:
        (parsed,) = parse_sources([source])
        opened = open_store(parsed.valid or parsed.parts, tokenizer, ReadingOptions(), data.cache or default_cache())
        if len(opened) < 2:
            check_length(len(opened), 2, source)
        return opened

    def batches(opened: TokenStore, rows: int) -> list[Batch]:
        made = batched(islice(windows(opened, context), rows), data.rows)
        return [{name: batch[name] for name in names if name in batch} for batch in made]

    measured = store(data.measured)
    test = LanguageTest(measured, context, model.config.vocab_size)
    if data.limit is not None:
        test.windows = test.windows[: data.limit]

    def metric(asked: nn.Module) -> dict[str, float]:
        found = test.measures(test.sums(TransformersTeacher(asked, packing)))
        return {name: float(found[name].value) for name in ("loss", "perplexity")}

    return Subject(
        model,
        tokenizer,
        batches(measured, 8 * data.rows),
        [] if data.calibration is None else batches(store(data.calibration), data.calibration_rows),
        metric,
        lambda asked: math.exp(-metric(asked)["loss"]),
        "1 / perplexity",
    )
