"""What a person can choose for the distillation of a language model, and what is refused."""

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import ClassVar

from neural_layers.distill.losses.divergences import DIVERGENCES
from neural_layers.distill.losses.schedule import Schedule
from neural_layers.distill.recipes.language_model_options import LanguageModelOptions
from neural_layers.distill.recipes.recipe_options import RecipeOptions, flag
from neural_layers.distill.recipes.trained import PRECISIONS
from neural_layers.errors import InputError

FROM_WEIGHTS, FROM_SCRATCH = 1e-4, 1e-3  # learning rates where none is given
_SIZES = ("layers", "width", "heads", "kv_heads", "ff", "max_context")


@dataclass(frozen=True)
class DistillLMOptions(RecipeOptions):
    """The options of `neural-layers distill lm`.

    data, valid, valid_fraction, text_field, document_separator, streaming, cache, context, preset, mixers, sizes,
    steps … save_steps: as in `LanguageModelOptions`

    teacher: a folder with a hybrid or any causal language model of transformers, and its tokenizer
    student: a folder with a hybrid to begin with, whose tokenizer is the teacher's; None for a new one of `preset`
    test:    a source that the report judges by; by default the validation text
    out:     the run's folder: new, empty, or of a run with the same options, which is then continued
    lr:      by default 1e-4 for weights from a folder and 1e-3 for new ones
    temperature, alpha, beta: numbers or schedules such as "4:1"; divergence, cosine, states: of the loss
    teacher_cache: where the teacher's `top_k` largest logits of all training sequences are kept, and found again
    baseline: also train the student without the teacher
    compress: forms of the student to make and measure, by commas
    report_to: trackers, by commas; statistics: log norms of gradients and weights every so many steps
    max_drop, gate_patience, lr_factor, min_retention, confidence, samples: of the `QualityGate` on the validation loss
    """

    free: ClassVar[tuple[str, ...]] = ("out", "resume", "cache", "keep", "report_to", "statistics")

    data: tuple[str, ...]
    teacher: Path
    out: Path
    valid: str | None = None
    valid_fraction: float | None = None
    test: str | None = None
    text_field: str = "text"
    document_separator: str | None = None
    streaming: bool = False
    cache: Path | None = None
    context: int = 256
    student: Path | None = None
    preset: str = "tiny"
    mixers: str = "hybrid"
    layers: int | None = None
    width: int | None = None
    heads: int | None = None
    kv_heads: int | None = None
    ff: int | None = None
    max_context: int | None = None
    dropout: float = 0.0
    steps: int = 2000
    batch: int = 12
    accumulate: int = 1
    lr: float | None = None
    min_lr: float | None = None
    warmup: int | None = None
    schedule: str = "cosine"
    weight_decay: float = 0.1
    beta2: float = 0.99
    clip: float = 1.0
    precision: str = "auto"
    eval_steps: int = 250
    save_steps: int | None = None
    keep: int = 2
    patience: int | None = None
    temperature: str = "2"
    alpha: str = "0.5"
    beta: str = "0.5"
    divergence: str = "forward"
    cosine: float = 0.0
    states: str = "last"
    label_smoothing: float = 0.0
    teacher_cache: Path | None = None
    top_k: int = 64
    max_drop: float = 0.05
    gate_patience: int = 3
    lr_factor: float = 0.5
    min_retention: float = 0.9
    confidence: float = 0.95
    samples: int = 1000
    baseline: bool = False
    compress: str | None = None
    report_to: str = "tensorboard"
    statistics: int | None = None
    seed: int = 0
    resume: bool = False

    def training(self) -> LanguageModelOptions:
        """What of this is as in the training of a language model; the student is its model."""
        names = {field.name for field in fields(LanguageModelOptions)} & {field.name for field in fields(self)}
        given = {name: getattr(self, name) for name in names}
        return LanguageModelOptions(
            **{**given, "model": self.student, "lr": self.rate, "save_steps": self.saves, "tokenizer": None}
        )

    @property
    def rate(self) -> float:
        """`lr`, or its default."""
        return self.lr if self.lr is not None else FROM_SCRATCH if self.student is None else FROM_WEIGHTS

    @property
    def saves(self) -> int:
        """`save_steps`, by default as often as there is a validation."""
        return self.eval_steps if self.save_steps is None else self.save_steps

    def check(self) -> None:
        """Raise InputError for a value that cannot be, naming the option."""
        if self.student is not None:
            for name in _SIZES:
                self.require((name,), lambda value: value is None, "changes the model of --student; leave one out")
        self.training().check()
        self.require(("top_k", "statistics"), lambda value: value >= 1, "must be at least 1")
        self.require(("cosine", "gate_patience"), lambda value: 0 <= value < math.inf, "must not be negative")
        self.one_of("precision", PRECISIONS)
        self.one_of("divergence", tuple(DIVERGENCES))
        self.one_of("states", ("last", "uniform"))
        if self.eval_steps % self.saves:
            raise InputError(
                f"--eval-steps {self.eval_steps} must be a multiple of --save-steps {self.saves}: a degraded student "
                "goes back to a checkpoint that was validated"
            )
        self._check_loss()
        self._check_cache()

    def _check_loss(self) -> None:
        for name in ("temperature", "alpha", "beta"):
            try:
                ends = Schedule.parse(getattr(self, name)).ends
            except InputError as error:
                raise InputError(f"{flag(name)}: {error}") from error
            if name == "temperature" and min(ends) <= 0:
                raise InputError(f"--temperature {self.temperature} must be positive")
            if min(ends) < 0:
                raise InputError(f"{flag(name)} {getattr(self, name)} must not be negative")
        if max(Schedule.parse(self.alpha).ends) == 0:
            raise InputError("--alpha 0 leaves the teacher out of the loss; neural-layers train needs none")

    def _check_cache(self) -> None:
        if self.teacher_cache is None:
            return
        if self.streaming:
            raise InputError(
                "--teacher-cache does not go with --streaming: the sequences have no numbers to be kept by"
            )
        if self.cosine:
            raise InputError(f"--cosine {self.cosine} compares hidden states, which --teacher-cache does not hold")
        if len(set(Schedule.parse(self.temperature).ends)) > 1:
            raise InputError(f"--temperature {self.temperature} changes, and --teacher-cache is made for one; give one")
