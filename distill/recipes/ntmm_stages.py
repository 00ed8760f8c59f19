"""The models of a classifier's distillation, one after the other."""

from collections.abc import Callable
from typing import Any

import torch
from transformers import PreTrainedModel, TrainerCallback, set_seed

from neural_layers.distill.gate import QualityGate
from neural_layers.distill.losses import DistillationLoss
from neural_layers.distill.recipes.ntmm_models import hybrid_config, load_classifier, new_hybrid, shallower
from neural_layers.distill.recipes.ntmm_options import FROM_SCRATCH, FROM_WEIGHTS, NTMMOptions
from neural_layers.distill.recipes.ntmm_preparing import Given, described, load_student
from neural_layers.distill.recipes.ntmm_training import NTMMData, Schedule, build_trainer
from neural_layers.distill.recipes.recipe_run import RecipeRun
from neural_layers.distill.recipes.trained import Trained, train_to_the_end, trained_before
from neural_layers.distill.recipes.versions import git_revision, versions
from neural_layers.distill.trainer import DistillationTrainer
from neural_layers.errors import InputError
from neural_layers.models.hybrid import HybridConfig


class Recipe:
    """The models of a run, one after the other; those that an earlier call has trained are loaded."""

    def __init__(self, options: NTMMOptions, run: RecipeRun, shared: NTMMData, given: Given, gate: QualityGate) -> None:
        self.options, self.run, self.shared, self.given, self.gate = options, run, shared, given, gate
        self.loss = _losses(options, shared)
        self.callbacks: tuple[TrainerCallback, ...] = ()  # of the student's trainer

    def check(self) -> None:
        """Raise InputError for what would be found only when a training begins."""
        options = self.options
        self.shared.feed()
        if options.teacher is None:
            self._hybrid_config("teacher")
        if options.student is None and options.student_layers is None:
            self._hybrid_config("student")
        try:
            DistillationLoss.ntmm(1, 1, **_weights(options))
        except ValueError as error:
            raise InputError(f"the loss cannot be: {error}") from error

    def begin(self) -> None:
        """Write what a continued run finds again."""
        options, run = self.options, self.run
        if not run.tokenizer.is_dir():
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

    def train(self) -> tuple[dict[str, PreTrainedModel], dict[str, Trained]]:
        """The teacher, the student and, where asked for, the student without its teacher."""
        models, trained = dict[str, PreTrainedModel](), dict[str, Trained]()
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

    def _trained(self, name: str, make: Callable[[], DistillationTrainer]) -> tuple[PreTrainedModel, Trained]:
        if self.run.is_trained(name):
            return self._load(name), trained_before(name, self.run)
        trainer = make()
        done = train_to_the_end(name, trainer, self.run)
        self.run.save_model(name, trainer.model, self.given.tokenizer)
        return trainer.model, done

    def _load(self, name: str) -> PreTrainedModel:
        return load_classifier(self.run.path / name, self.shared.data.classes, new_head=False)

    def _teacher_trainer(self) -> DistillationTrainer:
        options = self.options
        model = self.given.teacher
        if model is None:
            model = self._hybrid("teacher")
        rate = options.teacher_lr or (FROM_WEIGHTS if options.teacher else FROM_SCRATCH)
        epochs = options.teacher_epochs or options.epochs
        schedule = self.shared.schedule(options.teacher_steps, epochs, rate)
        return build_trainer("teacher", model, self.shared, self.run, schedule, loss=self.loss(None, None))

    def _student(self, teacher: PreTrainedModel) -> DistillationTrainer:
        model = self._new_student(teacher)
        loss = self.loss(model, teacher)
        trainer = build_trainer(
            "student", model, self.shared, self.run, self.schedule(), teacher=teacher, loss=loss, gate=self.gate
        )
        for callback in self.callbacks:
            trainer.add_callback(callback)
        return trainer

    def _baseline(self, teacher: PreTrainedModel) -> DistillationTrainer:
        model = self._new_student(teacher)
        return build_trainer("baseline", model, self.shared, self.run, self.schedule(), loss=self.loss(None, None))

    def _new_student(self, teacher: PreTrainedModel) -> PreTrainedModel:
        options = self.options
        if options.student is not None:
            return load_student(options, self.shared.data, self.given.tokenizer)
        if options.student_layers is not None:
            return shallower(teacher, options.student_layers, options.seed)
        return self._hybrid("student")

    def _hybrid(self, name: str) -> PreTrainedModel:
        return new_hybrid(self._hybrid_config(name), self.options.seed)

    def _hybrid_config(self, name: str) -> HybridConfig:
        options = self.options
        mixers, width, ff, heads = (getattr(options, f"{name}_{part}") for part in ("mixers", "width", "ff", "heads"))
        sizes = {
            "hidden_size": width,
            "intermediate_size": 2 * width if ff is None else ff,
            "num_attention_heads": heads,
            "classifier_pooling": options.pooling,
            "classifier_dropout": options.dropout,
            "dropout": options.dropout,
        }
        classes = self.shared.data.classes
        return hybrid_config(sizes, mixers, self.given.tokenizer, classes, options.max_length)

    def schedule(self) -> Schedule:
        """How long and how fast the student is trained."""
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
        student_dim, teacher_dim = (model.config.get_text_config().hidden_size for model in (student, teacher))
        return DistillationLoss.ntmm(
            student_dim,
            teacher_dim,
            **_weights(options),
            **same,
        )

    return loss


def _weights(options: NTMMOptions) -> dict[str, Any]:
    return {name: getattr(options, name) for name in ("temperature", "alpha", "beta", "cosine", "mse", "divergence")}
