"""What a person can choose for the distillation of a text classifier, and what is refused."""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from neural_layers.distill.classification.imbalance import METHODS
from neural_layers.distill.losses.divergences import DIVERGENCES
from neural_layers.distill.recipes.recipe_options import RecipeOptions, flag
from neural_layers.distill.recipes.trained import PRECISIONS
from neural_layers.errors import InputError

METRICS = ("accuracy", "macro_f1")
FROM_WEIGHTS, FROM_SCRATCH = 5e-5, 1e-3  # learning rates where none is given


@dataclass(frozen=True)
class NTMMOptions(RecipeOptions):
    """The options of `neural-layers distill ntmm`.

    data, valid, test, labels, label_maps, text_field, label_field: as `load_labelled` takes them
    out:        the run's folder: new, empty, or of a run with the same options, which is then continued
    imbalance:  "none", "weights" in the loss of the hard labels, or "sampling" of the small classes
    augment:    reword the training texts; synonyms, abbreviations: tables of one's own for it
    max_length: of a text in tokens

    teacher:    a folder with a sequence classifier; None for a hybrid trained here, with teacher_mixers, teacher_width,
                teacher_ff, teacher_heads and the tokenizer: a folder, or bpe:VOCABULARY trained on the texts
    fine_tune_teacher: train the given teacher first, with a new head where it has none for these classes
    student:    a folder with a model to begin with; None for a hybrid with student_mixers, student_width, student_ff
                and student_heads; student_layers instead takes so many of the teacher's layers, evenly
    pooling, dropout: of the hybrids that are made here

    epochs or steps, batch × accumulate, lr, warmup (a share of the steps), weight_decay, clip: of each training; the
                teacher's own are teacher_epochs or teacher_steps, and teacher_lr. lr is by default 5e-5 for weights
                from a folder and 1e-3 for new ones
    temperature, alpha, beta: numbers or schedules such as "5:2"; cosine, mse, label_smoothing, divergence: of the loss
    eval_steps: between validations, by default an epoch; patience: validations without a better `metric` after which a
                training stops, 0 for never
    max_drop, gate_patience, lr_factor, min_retention, confidence, samples: of the `QualityGate`
    baseline:   also train the student without the teacher
    compress:   forms of the student to make and measure, by commas
    report_to:  trackers, by commas; statistics: log norms of gradients and weights every so many steps
    find_lr:    steps of a range test, which is then all that is done
    """

    free: ClassVar[tuple[str, ...]] = (*RecipeOptions.free, "find_lr", "report_to", "statistics")

    data: tuple[str, ...]
    out: Path
    valid: tuple[str, ...] = ()
    test: tuple[str, ...] = ()
    labels: Path | None = None
    label_maps: tuple[str, ...] = ()
    text_field: str = "text"
    label_field: str = "label"
    imbalance: str = "none"
    augment: bool = False
    synonyms: Path | None = None
    abbreviations: Path | None = None
    max_length: int = 128
    tokenizer: str | None = None
    lowercase: bool = False
    teacher: Path | None = None
    fine_tune_teacher: bool = False
    teacher_mixers: str = "mamba,attention"
    teacher_width: int = 160
    teacher_ff: int | None = None
    teacher_heads: int = 4
    teacher_epochs: float | None = None
    teacher_steps: int | None = None
    teacher_lr: float | None = None
    student: Path | None = None
    student_layers: int | None = None
    student_mixers: str = "mamba,attention"
    student_width: int = 48
    student_ff: int | None = None
    student_heads: int = 4
    pooling: str = "mean"
    dropout: float = 0.1
    epochs: float = 8.0
    steps: int | None = None
    batch: int = 8
    accumulate: int = 4
    lr: float | None = None
    warmup: float = 0.1
    weight_decay: float = 0.01
    clip: float = 1.0
    precision: str = "auto"
    temperature: str = "3"
    alpha: str = "0.5"
    beta: str = "0.5"
    cosine: float = 0.1
    mse: float = 0.0
    label_smoothing: float = 0.1
    divergence: str = "forward"
    metric: str = "accuracy"
    eval_steps: int | None = None
    patience: int = 5
    max_drop: float = 0.05
    gate_patience: int = 3
    lr_factor: float = 0.5
    min_retention: float = 0.9
    confidence: float = 0.95
    samples: int = 1000
    baseline: bool = False
    compress: str | None = None
    find_lr: int | None = None
    report_to: str = "tensorboard"
    statistics: int | None = None
    seed: int = 0
    resume: bool = False

    def check(self) -> None:
        """Raise InputError for a value that cannot be, naming the option."""
        self.require(("statistics",), lambda value: value >= 1, "must be at least 1")
        counts = ("max_length", "batch", "accumulate", "steps", "teacher_steps", "eval_steps", "student_layers")
        sizes = ("teacher_width", "student_width", "teacher_heads", "student_heads")
        self.require(counts + sizes, lambda value: value >= 1, "must be at least 1")
        self.require(("find_lr",), lambda value: value >= 10, "steps are too few for a curve; give at least 10")
        self.require(
            ("epochs", "teacher_epochs", "lr", "teacher_lr"),
            lambda value: 0 < value < math.inf,
            "must be a positive number",
        )
        self.require(
            ("cosine", "mse", "weight_decay", "clip", "patience", "gate_patience"),
            lambda value: 0 <= value < math.inf,
            "must not be negative",
        )
        self.require(("warmup", "label_smoothing", "dropout"), lambda value: 0 <= value < 1, "must lie in [0, 1)")
        self.one_of("imbalance", METHODS)
        self.one_of("precision", PRECISIONS)
        self.one_of("metric", METRICS)
        self.one_of("divergence", tuple(DIVERGENCES))
        self.one_of("pooling", ("last", "mean", "attention", "gem"))
        self.check_seed()
        self._check_together()

    def _check_together(self) -> None:
        if self.fine_tune_teacher and self.teacher is None:
            raise InputError("--fine-tune-teacher needs --teacher DIR; without it a teacher is trained from scratch")
        trains = self.teacher is None or self.fine_tune_teacher
        for name in ("teacher_steps", "teacher_epochs", "teacher_lr"):
            if getattr(self, name) is not None and not trains:
                raise InputError(f"{flag(name)} trains the teacher, which --teacher gives; add --fine-tune-teacher")
        if self.student is not None and self.student_layers is not None:
            raise InputError("--student and --student-layers both say what the student is; leave one of them out")
        if (self.synonyms or self.abbreviations) and not self.augment:
            raise InputError("--synonyms and --abbreviations are tables of --augment; add it, or leave them out")
        if self.lowercase and not (self.tokenizer or "bpe:").startswith("bpe:"):
            raise InputError("--lowercase is of a tokenizer trained here; leave it out with --tokenizer DIR")
