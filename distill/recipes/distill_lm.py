"""The language model recipe: a causal language model distilled from a teacher, with a gate and a report."""

import os
import time
from collections.abc import Sequence
from datetime import datetime, timezone
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import TrainerCallback

from neural_layers.distill.recipes.distill_lm_comparison import Tested, compare, compressed
from neural_layers.distill.recipes.distill_lm_compression import check_forms
from neural_layers.distill.recipes.distill_lm_feed import NumberedFeed
from neural_layers.distill.recipes.distill_lm_options import DistillLMOptions
from neural_layers.distill.recipes.distill_lm_stages import DistillLMRecipe, LMData
from neural_layers.distill.recipes.distill_lm_teacher import load_teacher
from neural_layers.distill.recipes.distill_lm_validation import LanguageTest
from neural_layers.distill.recipes.language_model_data import LanguageData, cached_tokens, find_data, open_data
from neural_layers.distill.recipes.recipe_run import RecipeRun
from neural_layers.distill.recipes.trained import Trained, judged, mixed_precision
from neural_layers.distill.recipes.versions import git_revision, versions
from neural_layers.distill.report import write_report
from neural_layers.distill.text.errors import TextError
from neural_layers.distill.text.feed import BatchPlan, SampledFeed
from neural_layers.distill.text.sources import parse_sources
from neural_layers.distill.text.store import TokenStore
from neural_layers.distill.text.tokenizing import fingerprint
from neural_layers.distill.tracking import tracker_names
from neural_layers.distill.validation.recording import scores
from neural_layers.errors import InputError
from neural_layers.models.loading import check_model_folder, check_vocabulary, load_tokenizer, model_type

RECIPE = "lm"


def distill_language_model(
    options: DistillLMOptions, command: str = "", callbacks: Sequence[TrainerCallback] = ()
) -> dict[str, Any]:
    """Run the recipe, or continue it; return the content of `report.json`. All input is checked before anything is
    written but the tokens of the text and the teacher's cache.

    callbacks: of the student's trainer
    Raises InputError for input that a person can mend, FloatingPointError where a training diverges.
    """
    started = time.perf_counter()
    _check(options)
    run = RecipeRun(RECIPE, options)
    if run.is_finished:
        tqdm.write(f"{options.out} is finished; this is its report")
        return run.report()
    recipe = _open(options, run)
    recipe.callbacks = tuple(callbacks)
    run.begin(
        {
            "options": options.record(),
            "versions": versions(),
            "threads": torch.get_num_threads(),
            "git_revision": git_revision(),
            "data": recipe.data.described,
        }
    )
    models, trained = recipe.train()
    return _reported(recipe, models, trained, command, started)


def _check(options: DistillLMOptions) -> None:
    options.check()
    mixed_precision(options.precision)
    tracker_names(options.report_to)
    if options.compress is not None:
        check_forms(options.compress)
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise InputError("distill lm runs in one process; start it without torchrun")


def _open(options: DistillLMOptions, run: RecipeRun) -> DistillLMRecipe:
    """Read everything, and check that it fits together."""
    tokenizer, sources = _tokenizer(options), _sources(options)
    teacher = load_teacher(options.teacher, options.context)
    check_vocabulary(tokenizer, teacher.config.vocab_size, options.teacher)
    recipe = DistillLMRecipe(options, run, _read(options, sources, tokenizer, teacher), teacher, tokenizer)
    recipe.prepare()
    return recipe


def _tokenizer(options: DistillLMOptions) -> Any:
    """The teacher's. Raises InputError where that of the student differs."""
    model_type(options.teacher)  # a folder that is missing is told as such
    tokenizer = load_tokenizer(options.teacher)
    if options.student is not None:
        check_model_folder(options.student)
        own = load_tokenizer(options.student)
        if fingerprint(own) != fingerprint(tokenizer):
            raise InputError(
                f"the student in {options.student} has another tokenizer ({len(own)} tokens) than the teacher in "
                f"{options.teacher} ({len(tokenizer)} tokens); distillation needs one for both"
            )
    return tokenizer


def _sources(options: DistillLMOptions) -> LanguageData:
    data = find_data(options.training())
    if not data.valid and options.valid_fraction is None:
        raise InputError("no validation text for the gate; give one with --valid, or --valid-fraction")
    return data


def _read(options: DistillLMOptions, data: LanguageData, tokenizer: Any, teacher: Any) -> LMData:
    vocab_size = teacher.config.vocab_size
    plan = BatchPlan(options.batch, options.accumulate)
    opened = open_data(options.training(), data, tokenizer, plan, tqdm.write)
    assert opened.valid is not None
    valid = test = LanguageTest(_with_labels(opened.valid, "validation"), options.context, vocab_size)
    described = opened.described
    keys = {entry.get("key") for entry in described if entry["source"] != "validation"}
    if options.valid_fraction is None and opened.valid.key in keys:
        tqdm.write("warning: the validation text is the training text; it tells nothing of other texts")
    if options.test is not None:
        (source,) = parse_sources([options.test])
        store = cached_tokens("test", source.parts, tokenizer, data, options.cache)
        test = LanguageTest(_with_labels(store, options.test), options.context, vocab_size)
        described = [*described, {"source": "test", "key": store.key, "tokens": len(store)}]
        if store.key in keys:
            tqdm.write("warning: the test text is the training text; it tells nothing of other texts")
    feed = opened.feed
    if isinstance(feed, SampledFeed):
        feed = NumberedFeed(feed.sampler, plan)
    return LMData(feed, valid, test, described)


def _with_labels(store: TokenStore, name: str) -> TokenStore:
    if len(store) <= len(store.starts):
        raise TextError(f"{name}: {len(store)} tokens in {len(store.starts)} documents leave nothing to predict")
    return store


def _reported(
    recipe: DistillLMRecipe,
    models: dict[str, nn.Module],
    trained: dict[str, Trained],
    command: str,
    started: float,
) -> dict[str, Any]:
    options, run = recipe.options, recipe.run
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for model in models.values():
        model.to(device)
    tested = Tested.of(models, recipe.data.test)
    folders = {name: run.path / name for name in models} | {"teacher": options.teacher}
    compared = compare(models, trained, tested, recipe.tokenizer, folders, recipe.gate)
    report: dict[str, Any] = {
        "title": "Language model distillation",
        "task": "language",
        "preset": options.preset if options.student is None else str(options.student),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "seed": options.seed,
        "versions": versions(),
        "hyperparameters": _hyperparameters(recipe, models),
        "data": {
            "name": ", ".join(options.data) + ("" if options.test else "; judged by the validation text"),
            "train": options.steps * options.batch * options.accumulate,
            "valid": len(recipe.data.valid.windows),
            "test": len(recipe.data.test.windows),
            "sources": recipe.data.described,
        },
        **compared,
        "gate": judged(recipe.gate, compared["retention"], trained["student"]),
        "rollbacks": trained["student"].rollbacks,
        "validation": {
            "teacher": _teacher_validated(recipe),
            **{name: one.validations for name, one in trained.items()},
        },
        "training_log": {"teacher": [], **{name: one.log for name, one in trained.items()}},
    }
    if options.compress is not None:
        report["compression"] = compressed(
            models["student"].cpu(), recipe.tokenizer, options.compress, run.path, tested, recipe.gate
        )
    report["seconds"] = round(time.perf_counter() - started, 1)
    write_report(run.path, report)
    return report


def _teacher_validated(recipe: DistillLMRecipe) -> list[dict[str, float]]:
    """The teacher's scores on the validation text, which it has read beside the student, as of step 0."""
    measures = recipe.validator("student").teacher_measures()
    assert measures is not None
    return [{"step": 0, **scores(measures)}]


def _hyperparameters(recipe: DistillLMRecipe, models: dict[str, nn.Module]) -> dict[str, Any]:
    """The options, with what they left to the recipe filled in."""
    options = recipe.options
    given = {k: v for k, v in options.record().items() if k not in options.free}
    filled = {"lr": options.rate, "save_steps": options.saves, "warmup": options.training().warmup_steps}
    configs = {f"{name}_config": model.config.to_diff_dict() for name, model in models.items()}  # type: ignore[union-attr,operator]
    return {**given, **filled, **mixed_precision(options.precision), **configs}
