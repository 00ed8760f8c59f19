"""The CVM recipe: a teacher, a student distilled from it under a quality gate, and a report of what was kept."""

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from datetime import datetime, timezone
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import PreTrainedModel, TrainerCallback

from neural_layers.distill.compression import check_variants
from neural_layers.distill.data.overlap import overlap
from neural_layers.distill.presets import CVMPreset
from neural_layers.distill.recipes.comparison import compare, compressed, translate_test
from neural_layers.distill.recipes.cvm_models import given_models, new_model, run_tokenizer
from neural_layers.distill.recipes.cvm_options import CVMOptions
from neural_layers.distill.recipes.cvm_training import CVMData, build_trainer, scoring_of
from neural_layers.distill.recipes.described import teacher_validations
from neural_layers.distill.recipes.loading import load_teacher
from neural_layers.distill.recipes.recipe_run import RecipeRun
from neural_layers.distill.recipes.splits import load_splits
from neural_layers.distill.recipes.trained import (
    Trained,
    device,
    judged,
    mixed_precision,
    refuse_processes,
    train_to_the_end,
    trained_before,
)
from neural_layers.distill.recipes.versions import git_revision, versions
from neural_layers.distill.report import write_report
from neural_layers.distill.tracking import tracker_names
from neural_layers.distill.trainer import DistillationTrainer
from neural_layers.distill.validation.recording import digest, fingerprint

RECIPE = "cvm"
_SPLITS = ("train", "valid", "test")


def distill_cvm(options: CVMOptions, command: str = "", callbacks: Sequence[TrainerCallback] = ()) -> dict[str, Any]:
    """Run the recipe, or continue it; return the content of `report.json`. All input is checked before anything is
    written.

    callbacks: of the student's trainer.
    Raises InputError for input that a person can mend, FloatingPointError where a training diverges.
    """
    started = time.perf_counter()
    options.check()
    refuse_processes()
    mixed_precision(options.precision)
    tracker_names(options.report_to)
    gate, preset = options.gate(options.metric), options.chosen()
    if options.compress is not None:
        check_variants(options.compress, "translation")
    splits = load_splits(options.data, options.valid, options.test)
    teacher, tokenizer = given_models(options, preset)
    run = RecipeRun(RECIPE, options)
    if run.is_finished:
        tqdm.write(f"{run.path} is finished; this is its report")
        return run.report()
    warning = overlap(*([f"{p.source}\t{p.target}" for p in pairs] for pairs in (splits.train, splits.valid)))
    if warning is not None:
        tqdm.write(f"warning: {warning}")
    scoring = scoring_of(options, splits)
    data = CVMData(splits, run_tokenizer(tokenizer, run, splits, preset), preset, options, scoring)
    if data.train.dropped:
        longer = f"a side of more than {preset.max_length} tokens"
        tqdm.write(f"{data.train.dropped} of {len(splits.train)} pairs have {longer} and are left out")
    run.begin(_config(options, data, teacher))
    recipe = _Recipe(run, data, gate, callbacks)
    models, trained = recipe.train(teacher)

    tested = translate_test(models, data.tokenizer, splits.test, scoring)
    folders = {name: run.path / name for name in models}
    if options.teacher is not None:
        folders["teacher"] = options.teacher
    compared = compare(models, trained, tested, data.tokenizer, scoring, folders)
    report = {
        "title": "CVM distillation",
        "task": "translation",
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "preset": options.preset,
        "seed": options.seed,
        "versions": versions(),
        "hyperparameters": _hyperparameters(data),
        "data": _described(data),
        **compared,
        "gate": judged(gate, compared["retention"], trained["student"]),
        "rollbacks": trained["student"].rollbacks,
        "validation": {
            "teacher": teacher_validations(run.path / "validation", trained["student"]),
            **{name: one.validations for name, one in trained.items()},
        },
        "training_log": {"teacher": [], **{name: one.log for name, one in trained.items()}},
    }
    if options.compress is not None:
        report["compression"] = compressed(models["student"], data.tokenizer, options.compress, run.path, tested, gate)
    report["seconds"] = round(time.perf_counter() - started, 1)
    write_report(run.path, report)
    return report


class _Recipe:
    """The models of a run, one after the other; those that an earlier call has trained are loaded."""

    def __init__(self, run: RecipeRun, data: CVMData, gate: Any, callbacks: Sequence[TrainerCallback]) -> None:
        self.run, self.data, self.gate, self.callbacks = run, data, gate, callbacks

    def train(self, teacher: PreTrainedModel | None) -> tuple[dict[str, PreTrainedModel], dict[str, Trained]]:
        """The teacher (trained where none is given), the student and, where asked for, the one without teacher."""
        models, trained = dict[str, PreTrainedModel](), dict[str, Trained]()
        preset = self.data.preset
        if teacher is None:
            models["teacher"], trained["teacher"] = self._trained("teacher", self._teacher)
        else:
            models["teacher"] = teacher
        models["student"], trained["student"] = self._trained("student", lambda: self._student(models["teacher"]))
        if self.data.options.baseline:
            # Hard labels alone are smoothed as the teacher's training is: the comparison should not flatter
            # distillation.
            smoothing = preset.teacher_training.label_smoothing
            training = replace(preset.student_training, label_smoothing=smoothing)
            models["baseline"], trained["baseline"] = self._trained(
                "baseline",
                lambda: build_trainer("baseline", self._new(preset.student), self.data, self.run, training),
            )
        return models, trained

    def _teacher(self) -> DistillationTrainer:
        preset = self.data.preset
        return build_trainer("teacher", self._new(preset.teacher), self.data, self.run, preset.teacher_training)

    def _student(self, teacher: PreTrainedModel) -> DistillationTrainer:
        preset = self.data.preset
        return build_trainer(
            "student",
            self._new(preset.student),
            self.data,
            self.run,
            preset.student_training,
            teacher=teacher,
            gate=self.gate,
            callbacks=self.callbacks,
        )

    def _new(self, sizes: dict[str, Any]) -> PreTrainedModel:
        return new_model(self.data.preset, sizes, self.data.tokenizer, self.data.options.seed)

    def _trained(self, name: str, make: Callable[[], DistillationTrainer]) -> tuple[PreTrainedModel, Trained]:
        if self.run.is_trained(name):
            model: Any = load_teacher(self.run.path / name)[0]
            return model.to(device()), trained_before(name, self.run)
        trainer = make()
        done = train_to_the_end(name, trainer, self.run)
        self.run.save_model(name, trainer.model, self.data.tokenizer)
        return trainer.model, done


def _described(data: CVMData) -> dict[str, Any]:
    splits = data.splits
    return {"name": splits.name, **{k: len(getattr(splits, k)) for k in _SPLITS}}


def _hyperparameters(data: CVMData) -> dict[str, Any]:
    """The preset as it was changed by the options, and the options that no preset has."""
    preset: CVMPreset = data.preset
    chosen: dict[str, Any] = {
        k: str(v) if k in ("temperature", "alpha", "beta") else v for k, v in vars(preset).items()
    }
    for name in ("teacher_training", "student_training"):
        chosen[name] = asdict(chosen[name])
    names = ("divergence", "label_smoothing", "cosine", "mse", "teacher_cache", "top_k", "precision", "bertscore")
    own = {name: value for name, value in data.options.record().items() if name in names}
    return {**chosen, **own, "vocab_size": len(data.tokenizer), "left_out_pairs": data.train.dropped}


def _config(options: CVMOptions, data: CVMData, teacher: PreTrainedModel | None) -> dict[str, Any]:
    """What config.json holds; a continued run must have the same `data`, to the letter, and the same teacher."""
    texts = {name: digest(side for pair in getattr(data.splits, name) for side in pair) for name in _SPLITS}
    made_of = {"digests": texts, "teacher": None if teacher is None else fingerprint(teacher)}
    return {
        "options": options.record(),
        "hyperparameters": _hyperparameters(data),
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "git_revision": git_revision(),
        "data": {**_described(data), **made_of},
    }
