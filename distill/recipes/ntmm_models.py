"""The teacher and the student of a classifier's distillation: out of folders, or new."""

import copy
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForSequenceClassification, PreTrainedModel, set_seed

from neural_layers.distill.recipes.language_model_building import mixers_named
from neural_layers.distill.text.errors import first_line
from neural_layers.distill.text.tokenizing import fingerprint
from neural_layers.errors import InputError
from neural_layers.models.hybrid import HybridConfig, HybridForSequenceClassification
from neural_layers.models.loading import check_vocabulary, check_weights, load_tokenizer, model_type

# What the last layers of transformers' classifiers are called; the rest of a checkpoint must be there.
_HEAD = re.compile(r"^(score|classifier|classification_head|pre_classifier|qa_outputs|pooler|.*\.pooler)\b")
_LAYER = re.compile(r"^(.*\b(?:layers?|h|blocks?)\.)(\d+)(\..*)$")
_PATTERN_DEPTH = 4  # layers of a hybrid whose mixers are given as a pattern


def load_classifier(folder: Path, classes: Sequence[str], *, new_head: bool) -> PreTrainedModel:
    """The sequence classifier in `folder`, in float32, for these classes.

    new_head: whether a head that is missing, or has other classes, is made anew (and must be trained then)
    Raises: InputError for a folder without a model of a kind that classifies, weights that are not safetensors, do not
    fit or are not finite, and, without `new_head`, a head that is missing or has other classes.
    """
    kind = model_type(folder)
    check_weights(folder)
    names = dict(enumerate(classes))
    try:
        loaded: Any = AutoModelForSequenceClassification.from_pretrained(
            folder,
            local_files_only=True,
            use_safetensors=True,
            dtype=torch.float32,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are told below
            **({"id2label": names, "label2id": {name: i for i, name in names.items()}} if new_head else {}),
        )
    except Exception as error:
        raise InputError(
            f"the model in {folder} ({kind}) cannot be read as a classifier: {first_line(error)}"
        ) from error
    model, info = loaded
    mismatched = [name for name, *_ in info["mismatched_keys"]]
    absent = sorted({*info["missing_keys"], *mismatched})
    wrong = [name for name in absent if not _HEAD.match(name)]
    if wrong:
        raise InputError(
            f"the weights in {folder} do not fit its config.json: {wrong[0]} is missing or of another shape"
        )
    if absent and not new_head:
        raise InputError(
            f"the model in {folder} has no trained head ({absent[0]} is missing): it is no classifier yet; add "
            "--fine-tune-teacher to train one first"
        )
    wrong = [name for name, weight in model.named_parameters() if not bool(weight.isfinite().all())]
    if wrong:
        raise InputError(f"{wrong[0]} in {folder} holds numbers that are not finite; take an earlier checkpoint")
    if not new_head:
        _check_classes(model, folder, classes)
    return model


def _check_classes(model: PreTrainedModel, folder: Path, classes: Sequence[str]) -> None:
    config: Any = model.config
    names = [str(config.id2label[i]) for i in range(config.num_labels)]
    if len(names) != len(classes):
        raise InputError(
            f"the teacher in {folder} has {len(names)} classes and the data {len(classes)}; map the labels "
            "(--label-map), or add --fine-tune-teacher for a new head"
        )
    is_named = any(name != f"LABEL_{i}" for i, name in enumerate(names))
    differing = [(i, a, b) for i, (a, b) in enumerate(zip(names, classes, strict=True)) if a != b]
    if is_named and differing:
        number, theirs, ours = differing[0]
        raise InputError(
            f"class {number} of the teacher in {folder} is {theirs!r} and that of the data {ours!r}; name the data's "
            "classes in the teacher's order with --labels"
        )


def hybrid_config(
    sizes: dict[str, Any], mixers: str, tokenizer: Any, classes: Sequence[str], max_length: int
) -> HybridConfig:
    """Of a new hybrid classifier. sizes: fields of `HybridConfig`; mixers: as `mixers_named` takes them.

    Raises InputError for sizes that do not fit each other.
    """
    depth = _PATTERN_DEPTH if mixers in ("hybrid", "samba") else mixers.count(",") + 1
    names = mixers_named(mixers, depth)
    try:
        return HybridConfig(
            vocab_size=max(tokenizer.get_vocab().values()) + 1,
            num_hidden_layers=depth,
            mixers=names,
            max_position_embeddings=max_length,
            id2label=dict(enumerate(classes)),
            label2id={name: i for i, name in enumerate(classes)},
            pad_token_id=tokenizer.pad_token_id,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            **sizes,
        )
    except ValueError as error:
        raise InputError(f"the model cannot be built: {first_line(error)}") from error


def new_hybrid(config: HybridConfig, seed: int) -> HybridForSequenceClassification:
    """A hybrid classifier with new weights. Raises InputError for sizes that do not fit each other."""
    set_seed(seed)
    try:
        return HybridForSequenceClassification(config)
    except ValueError as error:
        raise InputError(f"the model cannot be built: {first_line(error)}") from error


def shallower(teacher: PreTrainedModel, layers: int, seed: int) -> PreTrainedModel:
    """A model of the teacher's kind with `layers` of its layers, spread evenly from the first to the last, and with its
    embeddings and head; as DistilBERT begins (arXiv 1910.01108).

    Raises InputError where the teacher has no more layers, and for a kind whose layers cannot be told by their names.
    """
    depth = getattr(teacher.config, "num_hidden_layers", None)
    if depth is None or layers >= depth:
        raise InputError(f"--student-layers {layers} must be fewer than the teacher's {depth}")
    chosen = [0] if layers == 1 else [round(i * (depth - 1) / (layers - 1)) for i in range(layers)]
    config = copy.deepcopy(teacher.config)
    config.num_hidden_layers = layers
    for name, value in list(vars(config).items()):
        if isinstance(value, list) and len(value) == depth:  # layer_types, mixers
            setattr(config, name, [value[i] for i in chosen])
    set_seed(seed)
    model: Any = AutoModelForSequenceClassification.from_config(config, dtype=torch.float32)
    weights = {}
    for name, weight in teacher.state_dict().items():
        found = _LAYER.match(name)
        if found is None:
            weights[name] = weight
        elif int(found[2]) in chosen:
            weights[f"{found[1]}{chosen.index(int(found[2]))}{found[3]}"] = weight
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        kind = type(teacher).__name__
        raise InputError(
            f"the layers of {kind} cannot be told by their names ({first_line(error)}); give a student with --student"
        ) from error
    return model


def tokenizer_of(folder: Path, max_length: int) -> Any:
    """The tokenizer in `folder`, with a padding token, that cuts at `max_length`.

    Raises InputError where there is none, or it has neither a padding nor an end token."""
    tokenizer = load_tokenizer(folder)
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise InputError(f"the tokenizer in {folder} has neither a pad_token nor an eos_token; set one of them")
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.model_max_length = max_length
    return tokenizer


def check_same_tokenizer(tokenizer: Any, origin: str, other: Any, other_origin: str) -> None:
    """Raise InputError where two tokenizers do not encode alike, naming both."""
    if fingerprint(tokenizer) != fingerprint(other):
        raise InputError(
            f"the tokenizer of {origin} ({len(tokenizer)} tokens) differs from that of {other_origin} ({len(other)} "
            "tokens); distillation needs one tokenizer for teacher and student"
        )


def fit_to_tokenizer(model: Any, tokenizer: Any, max_length: int, folder: Path | str) -> None:
    """Let the model know its padding token. Raises InputError for a vocabulary or a context that does not fit."""
    config = model.config.get_text_config()
    check_vocabulary(tokenizer, config.vocab_size, Path(folder))
    limit = getattr(config, "max_position_embeddings", None)
    if limit is not None and limit < max_length:
        raise InputError(f"the model in {folder} takes {limit} tokens; give --max-length {limit} or less")
    model.config.pad_token_id = config.pad_token_id = tokenizer.pad_token_id
