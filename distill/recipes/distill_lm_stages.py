"""The student of a language model's distillation, and the same student without its teacher, one after the other."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_callback import PrinterCallback

from neural_layers.distill.exact_trainer import Feed
from neural_layers.distill.gate import QualityGate
from neural_layers.distill.losses import DistillationLoss, StateAlignment
from neural_layers.distill.losses.schedule import Schedule
from neural_layers.distill.progress import ProgressBar
from neural_layers.distill.recipes.arguments import exact_arguments
from neural_layers.distill.recipes.distill_lm_feed import NumberedFeed, Sequences
from neural_layers.distill.recipes.distill_lm_options import DistillLMOptions
from neural_layers.distill.recipes.distill_lm_validation import LanguageTeacherValidator, LanguageTest
from neural_layers.distill.recipes.language_model_building import build_model
from neural_layers.distill.recipes.recipe_run import RecipeRun
from neural_layers.distill.recipes.trained import Trained, mixed_precision, train_to_the_end, trained_before
from neural_layers.distill.tasks import CausalTask
from neural_layers.distill.teacher_cache import TeacherCache, build_cache
from neural_layers.distill.text.sampling import collate
from neural_layers.distill.tracking import add_statistics, tracker_names, tracking_arguments
from neural_layers.distill.trainer import DistillationTrainer, check_vocabularies
from neural_layers.distill.validation.recording import Resampling
from neural_layers.models.hybrid import HybridForCausalLM
from neural_layers.models.loading import load_model


@dataclass(frozen=True)
class LMData:
    """What all trainings of a run share: the batches, the text to validate on, and the text of the report."""

    feed: Feed
    valid: LanguageTest
    test: LanguageTest
    described: list[dict[str, Any]]


class DistillLMRecipe:
    """The models of a run; those that an earlier call has trained are loaded."""

    def __init__(
        self, options: DistillLMOptions, run: RecipeRun, data: LMData, teacher: nn.Module, tokenizer: Any
    ) -> None:
        self.options, self.run, self.data = options, run, data
        self.teacher, self.tokenizer = teacher, tokenizer
        self.cached: TeacherCache | None = None
        self.callbacks: tuple[TrainerCallback, ...] = ()  # of the student's trainer
        self.gate = options.gate("loss")

    def prepare(self) -> None:
        """Find out that the student fits, and make or open the teacher's cache, before the run's folder is written."""
        self.new_student()
        if self.options.teacher_cache is not None and not self.run.is_trained("student"):
            self.cached = self._cache(self.options.teacher_cache)

    def train(self) -> tuple[dict[str, nn.Module], dict[str, Trained]]:
        """The teacher as it is, the student and, where asked for, the student without its teacher."""
        models, trained = {"teacher": self.teacher}, dict[str, Trained]()
        models["student"], trained["student"] = self._trained("student", self._student)
        if self.options.baseline:
            models["baseline"], trained["baseline"] = self._trained("baseline", self._baseline)
        return models, trained

    def new_student(self) -> HybridForCausalLM:
        """The student before its training. Raises InputError where it does not fit the teacher."""
        options = self.options
        teacher: Any = self.teacher
        set_seed(options.seed)
        model = build_model(options.training(), self.tokenizer)
        entries = teacher.config.vocab_size
        if options.student is None and model.config.vocab_size != entries:
            model.config.vocab_size = entries  # the teacher's is padded
            set_seed(options.seed)
            model = HybridForCausalLM(model.config)
        check_vocabularies(teacher, model)
        return model

    def _trained(self, name: str, make: Callable[[], DistillationTrainer]) -> tuple[nn.Module, Trained]:
        if self.run.is_trained(name):
            return load_model(self.run.path / name), trained_before(name, self.run)
        trainer = make()
        done = train_to_the_end(name, trainer, self.run)
        # Trainer turns the cache off in the config, which would make generation from the saved model slow.
        trainer.model.config.use_cache = True
        self.run.save_model(name, trainer.model, self.tokenizer)
        return trainer.model.eval(), done

    def _student(self) -> DistillationTrainer:
        model = self.new_student()
        loss = distillation_loss(self.options, model, self.teacher)
        teacher = self.teacher if self.cached is None else self.cached
        return self._trainer("student", model, loss, teacher, self.gate)

    def _baseline(self) -> DistillationTrainer:
        loss = DistillationLoss(alpha=0.0, beta=1.0, label_smoothing=self.options.label_smoothing)
        return self._trainer("baseline", self.new_student(), loss, None, None)

    def _cache(self, folder: Path) -> TeacherCache:
        """What the teacher says of the training sequences, made before the first step or found again."""
        options, feed = self.options, self.data.feed
        assert isinstance(feed, NumberedFeed)
        with tqdm(desc="teacher cache", unit="sequence", leave=False) as bar:
            return build_cache(
                folder,
                CausalTask(),
                self.teacher,
                Sequences(feed.sampler, options.steps * feed.plan.step),
                collate,
                k=options.top_k,
                temperature=Schedule.parse(options.temperature).start,
                batch_size=feed.plan.batch,
                progress=lambda done, total: _show(bar, done, total),
            )

    def validator(self, name: str) -> LanguageTeacherValidator:
        """Of the student, beside its teacher; or of the baseline alone."""
        folder = self.run.path / "validation"
        resampling = Resampling(self.options.samples, self.options.confidence)
        if name == "student":
            return LanguageTeacherValidator(self.data.valid, folder, self.teacher, resampling)
        return LanguageTeacherValidator(self.data.valid, folder / name, None, resampling)

    def _trainer(
        self, name: str, model: HybridForCausalLM, loss: DistillationLoss, teacher: Any, gate: QualityGate | None
    ) -> DistillationTrainer:
        options = self.options
        trainer = DistillationTrainer(
            model=model,
            args=_arguments(options, self.run, name),
            feed=self.data.feed,
            task=CausalTask(),
            teacher=teacher,
            loss=loss,
            validate=self.validator(name),
            gate=gate,
            keeps_best=True,
            keep=options.keep,
            patience=options.patience,
            callbacks=[ProgressBar(name, self.run, "loss"), *(self.callbacks if name == "student" else ())],
        )
        trainer.remove_callback(PrinterCallback)
        add_statistics(trainer, options.statistics)
        self.teacher.to(trainer.args.device)  # also where its answers come out of a cache: it is validated beside
        set_seed(options.seed)  # of dropout: the same whatever was made before
        return trainer


def distillation_loss(options: DistillLMOptions, student: Any, teacher: Any) -> DistillationLoss:
    """The loss that the options name, with the alignment of states where `cosine` asks for it."""
    states = None
    if options.cosine:
        ours, theirs = student.config, teacher.config
        set_seed(options.seed)  # of the projections
        states = StateAlignment(
            options.states,  # type: ignore[arg-type]  # checked by the options
            of="token",
            student_dim=ours.hidden_size,
            teacher_dim=theirs.hidden_size,
            num_student_layers=ours.num_hidden_layers,
            num_teacher_layers=theirs.num_hidden_layers,
        )
    return DistillationLoss(
        temperature=options.temperature,
        alpha=options.alpha,
        beta=options.beta,
        cosine=options.cosine,
        states=states,
        label_smoothing=options.label_smoothing,
        divergence=options.divergence,  # type: ignore[arg-type]
    )


def _show(bar: Any, done: int, total: int) -> None:
    bar.total = total
    bar.update(done - bar.n)


def _arguments(options: DistillLMOptions, run: RecipeRun, name: str) -> TrainingArguments:
    schedules = {"linear": "linear", "constant": "constant_with_warmup", "cosine": "cosine_with_min_lr"}
    tracking = tracking_arguments(tracker_names(options.report_to), run.path, name)
    least = options.rate / 10 if options.min_lr is None else options.min_lr
    return exact_arguments(
        run.checkpoints(name),
        steps=options.steps,
        eval_steps=options.eval_steps,
        save_steps=options.saves,
        per_device_train_batch_size=options.batch,
        gradient_accumulation_steps=options.accumulate,
        learning_rate=options.rate,
        lr_scheduler_type=schedules[options.schedule],
        lr_scheduler_kwargs={"min_lr": least} if options.schedule == "cosine" else {},
        warmup_steps=options.training().warmup_steps,
        weight_decay=options.weight_decay,
        adam_beta2=options.beta2,
        max_grad_norm=options.clip,
        **mixed_precision(options.precision),
        metric_for_best_model="loss",
        greater_is_better=False,
        logging_steps=max(1, min(options.steps // 100, 50)),
        seed=options.seed,
        **tracking,
    )
