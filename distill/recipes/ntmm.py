"""The NTMM recipe: a text classifier distilled from a teacher, with a gate, and a report of what was kept."""

import time
from collections.abc import Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from typing import Any

from transformers import PreTrainedModel, TrainerCallback

from neural_layers.distill.compression import check_variants
from neural_layers.distill.learning_rate import DEFAULT_STEPS, LearningRateCurve, find_learning_rate
from neural_layers.distill.recipes.described import teacher_validations
from neural_layers.distill.recipes.ntmm_comparison import ask_models, compare, compressed
from neural_layers.distill.recipes.ntmm_options import NTMMOptions
from neural_layers.distill.recipes.ntmm_preparing import described, open_models, read_data
from neural_layers.distill.recipes.ntmm_stages import Recipe
from neural_layers.distill.recipes.ntmm_training import NTMMData, tell
from neural_layers.distill.recipes.recipe_run import RecipeRun
from neural_layers.distill.recipes.trained import Trained, judged, mixed_precision
from neural_layers.distill.recipes.versions import versions
from neural_layers.distill.report import write_report
from neural_layers.distill.tracking import tracker_names

RECIPE = "ntmm"


def distill_ntmm(options: NTMMOptions, command: str = "", callbacks: Sequence[TrainerCallback] = ()) -> dict[str, Any]:
    """Run the recipe, or continue it; return the content of `report.json`. All input is checked before anything is
    written.

    callbacks: of the student's trainer.
    Raises InputError for input that a person can mend, FloatingPointError where a training diverges.
    """
    started = time.perf_counter()
    recipe = _open(options)
    recipe.callbacks = tuple(callbacks)
    if recipe.run.is_finished:
        tell([f"{options.out} is finished; this is its report"])
        return recipe.run.report()
    recipe.begin()
    models, trained = recipe.train()
    return _reported(recipe, models, trained, command, started)


def find_rate(options: NTMMOptions) -> tuple[str, LearningRateCurve]:
    """A range test of the model that the run would train next, which is named: "teacher", "student" or "baseline".

    Nothing is trained; the next call of `distill_ntmm` goes on as if this had not been.
    """
    recipe = _open(options)
    recipe.begin()
    name, trainer = recipe.next_trainer()
    return name, find_learning_rate(trainer, steps=options.find_lr or DEFAULT_STEPS)


def _open(options: NTMMOptions) -> Recipe:
    """Read and check everything."""
    options.check()
    mixed_precision(options.precision)
    tracker_names(options.report_to)
    if options.compress is not None:
        check_variants(options.compress, "classification")
    gate = options.gate(options.metric)
    data, lines = read_data(options)
    run = RecipeRun(RECIPE, options)
    given = open_models(options, data, run)
    recipe = Recipe(options, run, NTMMData(data, given.tokenizer, options), given, gate)
    recipe.check()
    tell(lines)
    return recipe


def _reported(
    recipe: Recipe,
    models: dict[str, PreTrainedModel],
    trained: dict[str, Trained],
    command: str,
    started: float,
) -> dict[str, Any]:
    options, run, data = recipe.options, recipe.run, recipe.shared.data
    tokenizer = recipe.given.tokenizer
    folders = {name: run.path / name for name in models}
    if not recipe.trains_teacher:
        assert options.teacher is not None
        folders["teacher"] = options.teacher
    tested = ask_models(models, tokenizer, data)
    compared = compare(models, trained, tested, tokenizer, data, folders, recipe.gate)
    report: dict[str, Any] = {
        "title": "NTMM distillation",
        "task": "classification",
        "preset": "ntmm",
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "seed": options.seed,
        "versions": versions(),
        "hyperparameters": _hyperparameters(recipe, models),
        "data": described(data, options),
        **compared,
        "gate": judged(recipe.gate, compared["retention"], trained["student"]),
        "rollbacks": trained["student"].rollbacks,
        "validation": {
            "teacher": teacher_validations(run.path / "validation", trained["student"]),
            **{name: one.validations for name, one in trained.items()},
        },
        "training_log": {"teacher": [], **{name: one.log for name, one in trained.items()}},
    }
    if options.compress is not None:
        report["compression"] = compressed(
            models["student"], tokenizer, options.compress, run.path, tested, data, recipe.gate
        )
    report["seconds"] = round(time.perf_counter() - started, 1)
    write_report(run.path, report)
    return report


def _hyperparameters(recipe: Recipe, models: dict[str, PreTrainedModel]) -> dict[str, Any]:
    """The options, with what they left to the recipe filled in."""
    options = {k: v for k, v in recipe.options.record().items() if k not in recipe.options.free}
    described_models = {f"{name}_config": model.config.to_diff_dict() for name, model in models.items()}
    schedule = asdict(recipe.schedule())
    return {
        **options,
        **schedule,
        **mixed_precision(recipe.options.precision),
        "cut_texts": recipe.shared.train.cut,
        **described_models,
    }
