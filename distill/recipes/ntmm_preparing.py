"""What a classifier's distillation begins with: data that was looked at, one tokenizer, models out of folders."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from neural_layers.distill.classification import ClassBalance, load_labelled
from neural_layers.distill.classification.data import ClassificationData, Fields
from neural_layers.distill.data.overlap import overlap
from neural_layers.distill.recipes.ntmm_models import (
    check_same_tokenizer,
    fit_to_tokenizer,
    load_classifier,
    tokenizer_of,
)
from neural_layers.distill.recipes.ntmm_options import NTMMOptions
from neural_layers.distill.recipes.recipe_run import RecipeRun
from neural_layers.distill.text.tokenizing import bpe_tokenizer
from neural_layers.distill.validation.recording import digest
from neural_layers.errors import InputError
from neural_layers.models.loading import model_type

_BPE = "bpe:"
DEFAULT_TOKENIZER = "bpe:4096"


@dataclass(frozen=True)
class Given:
    """The tokenizer, and the teacher that a folder holds; None for one that is made in this run."""

    tokenizer: Any
    teacher: PreTrainedModel | None


def read_data(options: NTMMOptions) -> tuple[ClassificationData, list[str]]:
    """The labelled texts, and lines on what a person should know of them."""
    data = load_labelled(
        options.data,
        options.valid,
        options.test,
        labels=options.labels,
        label_maps=options.label_maps,
        fields=Fields(options.text_field, options.label_field),
    )
    sizes = ", ".join(f"{len(getattr(data, split)):,} {split}" for split in ("train", "valid", "test"))
    lines = [f"data: {sizes} texts of {len(data.classes)} classes"]
    sources = Counter(data.train.sources)
    if len(sources) > 1:
        lines.append("training texts: " + ", ".join(f"{name} {count:,}" for name, count in sources.items()))
    lines.append(ClassBalance.of(data.train.labels, data.classes).sentence(options.imbalance))
    for split in ("valid", "test"):
        texts = getattr(data, split)
        absent = [name for i, name in enumerate(data.classes) if i not in set(texts.labels)]
        if absent:
            lines.append(f"warning: the {split} data has no text of class {', '.join(absent)}: no F1 is told for it")
        shared = overlap(data.train.texts, texts.texts)
        if shared is not None:
            lines.append("warning: " + shared.replace("the validation data", f"the {split} data"))
    return data, lines


def described(data: ClassificationData, options: NTMMOptions) -> dict[str, Any]:
    """What `config.json` and the report say of the data."""
    splits = {split: getattr(data, split) for split in ("train", "valid", "test")}
    return {
        "name": ", ".join(dict.fromkeys(data.train.sources)) if len(options.data) > 1 else options.data[0],
        **{split: len(texts) for split, texts in splits.items()},
        "classes": list(data.classes),
        "sources": dict(Counter(data.train.sources)),
        "imbalance_ratio": round(ClassBalance.of(data.train.labels, data.classes).ratio, 3),
        "digest": digest(
            f"{label}\t{text}" for s in splits.values() for text, label in zip(s.texts, s.labels, strict=True)
        ),
    }


def open_models(options: NTMMOptions, data: ClassificationData, run: RecipeRun) -> Given:
    """The tokenizer, and the models that folders hold, all of which fit each other.

    Raises: InputError for folders that cannot be used, tokenizers that differ, and models that do not fit.
    """
    for folder in (options.teacher, options.student):
        if folder is not None:
            model_type(folder)
    tokenizer = _tokenizer(options, data, run)
    teacher = None
    if options.teacher is not None:
        teacher = load_classifier(options.teacher, data.classes, new_head=options.fine_tune_teacher)
        fit_to_tokenizer(teacher, tokenizer, options.max_length, options.teacher)
    if options.student is not None:
        student = load_student(options, data, tokenizer)
        if teacher is not None:
            _check_vocabularies(options, student, teacher)
    return Given(tokenizer, teacher)


def load_student(options: NTMMOptions, data: ClassificationData, tokenizer: Any) -> PreTrainedModel:
    """The model that `options.student` holds, with a head for these classes.

    Raises InputError as `open_models` does.
    """
    assert options.student is not None
    if (options.student / "tokenizer.json").is_file():
        own = tokenizer_of(options.student, options.max_length)
        check_same_tokenizer(own, f"the student in {options.student}", tokenizer, _origin(options))
    student = load_classifier(options.student, data.classes, new_head=True)
    fit_to_tokenizer(student, tokenizer, options.max_length, options.student)
    return student


def _check_vocabularies(options: NTMMOptions, student: PreTrainedModel, teacher: PreTrainedModel) -> None:
    ours, theirs = (model.config.get_text_config().vocab_size for model in (student, teacher))
    if ours != theirs:
        raise InputError(
            f"the student in {options.student} has a vocabulary of {ours} and the teacher in {options.teacher} of "
            f"{theirs}; distillation needs one tokenizer for both"
        )


def _origin(options: NTMMOptions) -> str:
    return f"this run ({options.tokenizer})" if options.teacher is None else f"the teacher in {options.teacher}"


def _tokenizer(options: NTMMOptions, data: ClassificationData, run: RecipeRun) -> Any:
    """The teacher's; where it is made here the one chosen, the student's, or one trained on the texts."""
    chosen = options.tokenizer
    folder = None if chosen is None or chosen.startswith(_BPE) else Path(chosen)
    if options.teacher is not None:
        tokenizer = tokenizer_of(options.teacher, options.max_length)
        if folder is not None:
            other = tokenizer_of(folder, options.max_length)
            check_same_tokenizer(other, f"--tokenizer {folder}", tokenizer, f"the teacher in {options.teacher}")
        elif chosen is not None:
            raise InputError(
                f"--tokenizer {chosen} trains one, and the teacher in {options.teacher} has its own; leave it out"
            )
        return tokenizer
    if (run.tokenizer / "tokenizer.json").is_file():
        return tokenizer_of(run.tokenizer, options.max_length)
    if folder is not None:
        return tokenizer_of(folder, options.max_length)
    if chosen is None and options.student is not None:
        return tokenizer_of(options.student, options.max_length)
    return _trained_tokenizer(chosen or DEFAULT_TOKENIZER, options, data)


def _trained_tokenizer(chosen: str, options: NTMMOptions, data: ClassificationData) -> Any:
    from tokenizers import normalizers

    size = chosen.removeprefix(_BPE)
    if not size.isdecimal():
        raise InputError(f"--tokenizer {chosen}: write bpe:VOCABULARY with a number, or a tokenizer's folder")
    texts = data.train.texts
    tokenizer = bpe_tokenizer([t.lower() for t in texts] if options.lowercase else texts, int(size))
    if options.lowercase:
        tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.model_max_length = options.max_length
    return tokenizer
