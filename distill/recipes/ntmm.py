"""The NTMM recipe: a text classifier distilled from a teacher, with a gate, and a report of what was kept."""

import time
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, set_seed

from neural_layers.distill.compression import check_variants
from neural_layers.distill.gate import QualityGate
from neural_layers.distill.learning_rate import LearningRateCurve, find_learning_rate
from neural_layers.distill.losses import DistillationLoss
from neural_layers.distill.recipes.ntmm_comparison import ask_models, compare, compressed, judged
from neural_layers.distill.recipes.ntmm_models import load_classifier, new_hybrid, shallower
from neural_layers.distill.recipes.ntmm_options import FROM_SCRATCH, FROM_WEIGHTS, NTMMOptions
from neural_layers.distill.recipes.ntmm_preparing import Given, described, open_models, read_data
from neural_layers.distill.recipes.ntmm_run import NTMMRun
from neural_layers.distill.recipes.ntmm_training import (
    NTMMData,
    Schedule,
    TrainedClassifier,
    build_trainer,
    precision,
    tell,
    train_classifier,
    trained_before,
)
from neural_layers.distill.recipes.versions import git_revision, versions
from neural_layers.distill.report import write_report
from neural_layers.distill.trainer import DistillationTrainer


def distill_ntmm(options: NTMMOptions, command: str = "") -> dict[str, Any]:
    """Run the recipe, or continue it; return the content of `report.json`. All input is checked before anything is
    written.

    Raises InputError for input that a person can mend, FloatingPointError where a training diverges.
    """
    started = time.perf_counter()
    recipe = _open(options)
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
    trainer = recipe.next_trainer()
    return trainer[0], find_learning_rate(trainer[1])


def _open(options: NTMMOptions) -> "Recipe":
    """Read and check everything."""
    options.check()
    precision(options)
    if options.compress is not None:
        check_variants(options.compress, "classification")
    gate = QualityGate(
        options.metric, options.max_drop, options.gate_patience, options.lr_factor, options.min_retention
    )
    data, lines = read_data(options)
    run = NTMMRun(options)
    given = open_models(options, data, run)
    tell(lines)
    return Recipe(options, run, NTMMData(data, given.tokenizer, options), given, gate)


class Recipe:
    """The models of a run, one after the other; those that an earlier call has trained are loaded."""

    def __init__(self, options: NTMMOptions, run: NTMMRun, shared: NTMMData, given: Given, gate: QualityGate) -> None:
        self.options, self.run, self.shared, self.given, self.gate = options, run, shared, given, gate
        self.loss = _losses(options, shared)

    def begin(self) -> None:
        """Write what a continued run finds again."""
        options, run = self.options, self.run
        if not (run.path / "tokenizer").is_dir():
            run.save_tokenizer(self.given.tokenizer)
        run.begin(
            {
                "options": options.record(),
                "versions": versions(),
                "threads": torch.get_num_threads(),
                "git_revision": git_revision(),
                "data": described(self.shared.data, options),
            }
        )

    @property
    def trains_teacher(self) -> bool:
        """Whether the teacher is trained in this run."""
        return self.options.teacher is None or self.options.fine_tune_teacher

    def train(self) -> tuple[dict[str, PreTrainedModel], dict[str, TrainedClassifier]]:
        """The teacher, the student and, where asked for, the student without its teacher."""
        models, trained = dict[str, PreTrainedModel](), dict[str, TrainedClassifier]()
        if self.trains_teacher:
            models["teacher"], trained["teacher"] = self._trained("teacher", self._teacher_trainer)
        else:
            assert self.given.teacher is not None
            models["teacher"] = self.given.teacher
        models["student"], trained["student"] = self._trained("student", lambda: self._student(models["teacher"]))
        if self.options.baseline:
            models["baseline"], trained["baseline"] = self._trained(
                "baseline", lambda: self._baseline(models["teacher"])
            )
        return models, trained

    def next_trainer(self) -> tuple[str, DistillationTrainer]:
        """The trainer of the first model that is not trained yet, with its name."""
        if self.trains_teacher and not self.run.is_trained("teacher"):
            return "teacher", self._teacher_trainer()
        teacher = self._load("teacher") if self.trains_teacher else self.given.teacher
        assert teacher is not None
        if not self.run.is_trained("student") or not self.options.baseline:
            return "student", self._student(teacher)
        return "baseline", self._baseline(teacher)

    def _trained(self, name: str, make: Callable[[], DistillationTrainer]) -> tuple[PreTrainedModel, TrainedClassifier]:
        if self.run.is_trained(name):
            return self._load(name), trained_before(name, self.run)
        trainer = make()
        done = train_classifier(name, trainer, self.run)
        self.run.save_model(name, trainer.model, self.given.tokenizer)
        return trainer.model, done

    def _load(self, name: str) -> PreTrainedModel:
        return load_classifier(self.run.path / name, self.shared.data.classes, new_head=False)

    def _teacher_trainer(self) -> DistillationTrainer:
        options = self.options
        model = self.given.teacher
        if model is None:
            width, ff = options.teacher_width, options.teacher_ff
            model = self._hybrid(width, ff, options.teacher_heads, options.teacher_mixers)
        rate = options.teacher_lr or (FROM_WEIGHTS if options.teacher else FROM_SCRATCH)
        epochs = options.teacher_epochs or options.epochs
        schedule = self.shared.schedule(options.teacher_steps, epochs, rate)
        return build_trainer("teacher", model, self.shared, self.run, schedule, loss=self.loss(None, None))

    def _student(self, teacher: PreTrainedModel) -> DistillationTrainer:
        model = self._new_student(teacher)
        loss = self.loss(model, teacher)
        return build_trainer(
            "student", model, self.shared, self.run, self._schedule(), teacher=teacher, loss=loss, gate=self.gate
        )

    def _baseline(self, teacher: PreTrainedModel) -> DistillationTrainer:
        model = self._new_student(teacher)
        return build_trainer("baseline", model, self.shared, self.run, self._schedule(), loss=self.loss(None, None))

    def _new_student(self, teacher: PreTrainedModel) -> PreTrainedModel:
        options = self.options
        if options.student is not None:  # read again: the one in memory may have been trained
            return open_models(options, self.shared.data, self.run).student  # type: ignore[return-value]
        if options.student_layers is not None:
            return shallower(teacher, options.student_layers, options.seed)
        width, ff = options.student_width, options.student_ff
        return self._hybrid(width, ff, options.student_heads, options.student_mixers)

    def _hybrid(self, width: int, ff: int | None, heads: int, mixers: str) -> PreTrainedModel:
        options = self.options
        sizes = {
            "hidden_size": width,
            "intermediate_size": 2 * width if ff is None else ff,
            "num_attention_heads": heads,
            "classifier_pooling": options.pooling,
            "classifier_dropout": options.dropout,
            "dropout": options.dropout,
        }
        classes = self.shared.data.classes
        return new_hybrid(sizes, mixers, self.given.tokenizer, classes, options.max_length, options.seed)

    def _schedule(self) -> Schedule:
        options = self.options
        has_weights = options.student is not None or options.student_layers is not None
        rate = options.lr or (FROM_WEIGHTS if has_weights else FROM_SCRATCH)
        return self.shared.schedule(options.steps, options.epochs, rate)


def _losses(
    options: NTMMOptions, shared: NTMMData
) -> Callable[[PreTrainedModel | None, PreTrainedModel | None], DistillationLoss]:
    """The loss of a student with its teacher, or of a model without."""

    def loss(student: PreTrainedModel | None, teacher: PreTrainedModel | None) -> DistillationLoss:
        same: dict[str, Any] = {"label_smoothing": options.label_smoothing, "class_weights": shared.class_weights}
        if student is None or teacher is None:
            return DistillationLoss(alpha=0.0, beta=1.0, **same)
        set_seed(options.seed)  # of the projection
        widths = (model.config.get_text_config().hidden_size for model in (student, teacher))
        return DistillationLoss.ntmm(
            *widths,
            temperature=options.temperature,
            alpha=options.alpha,
            beta=options.beta,
            cosine=options.cosine,
            mse=options.mse,
            divergence=options.divergence,
            **same,
        )

    return loss


def _reported(
    recipe: Recipe,
    models: dict[str, PreTrainedModel],
    trained: dict[str, TrainedClassifier],
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
    compared = compare(models, trained, tested, tokenizer, data, folders)
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
        "validation": {"teacher": [], **{name: one.validations for name, one in trained.items()}},
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
    options = {k: v for k, v in recipe.options.record().items() if k not in ("out", "resume", "find_lr")}
    described_models = {f"{name}_config": model.config.to_diff_dict() for name, model in models.items()}
    schedule = asdict(recipe._schedule())
    return {
        **options,
        **schedule,
        **precision(recipe.options),
        "cut_texts": recipe.shared.train.cut,
        **described_models,
    }


def learning_rate_folder(out: Path) -> Path:
    """Where `find_rate`'s plots go."""
    return out / "learning_rate"
