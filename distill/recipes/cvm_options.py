"""What a person can choose for the distillation of a translator, and what is refused."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch

from neural_layers.distill.losses import DistillationLoss, Schedule
from neural_layers.distill.losses.divergences import DIVERGENCES
from neural_layers.distill.presets import CVMPreset, Training, preset_named
from neural_layers.distill.recipes.recipe_options import RecipeOptions
from neural_layers.distill.recipes.trained import PRECISIONS
from neural_layers.distill.text.errors import first_line
from neural_layers.errors import InputError
from neural_layers.models.cvm import CVMConfig, CVMForConditionalGeneration

METRICS = ("bleu", "chrf")
_SIZES = {
    "student_layers": "num_hidden_layers",
    "student_width": "hidden_size",
    "student_heads": "num_attention_heads",
    "student_ff": "intermediate_size",
}


@dataclass(frozen=True)
class CVMOptions(RecipeOptions):
    """The options of `neural-layers distill cvm`. What is None comes from the preset.

    out:       the run's folder: new, empty, or of a run with the same options, which is then continued
    data:      a file of english<TAB>german lines, or None for the embedded corpus; with it go valid and test
    language:  of the targets, needed where it is written without spaces (`zh`, `ja`, …)
    preset:    "tiny", "small" or "paper". steps: the student's training steps (`num_iterations`); teacher_steps: the
               teacher's, by default as many
    teacher:   a folder with a trained CVM model and its tokenizer, or None to train one first
    tokenizer: a folder with a tokenizer, or None to train one on the data (or to take the teacher's)
    student_layers, student_width, student_heads, student_ff: of the student, instead of the preset's
    baseline:  also train the student without the teacher, with the same steps
    batch, lr, warmup (steps), precision: of the trainings. temperature, alpha, beta: numbers or schedules ("6:2");
               divergence, label_smoothing, cosine, mse: of the student's loss
    teacher_cache: a folder where the teacher's `top_k` largest logits are kept, and trained from
    eval_steps, save_steps: between validations and checkpoints; eval_sentences: of the validation data
    bertscore: a folder with an encoder for BERTScore, and which of its layers
    metric, max_drop, gate_patience, lr_factor, min_retention, confidence, samples: of the `QualityGate`
    compress:  forms of the student to make and measure, by commas
    report_to: trackers, by commas; statistics: log norms of gradients and weights every so many steps
    """

    free: ClassVar[tuple[str, ...]] = ("out", "resume", "report_to", "statistics")

    out: Path
    data: Path | None = None
    valid: Path | None = None
    test: Path | None = None
    language: str | None = None
    preset: str = "tiny"
    steps: int | None = None
    teacher_steps: int | None = None
    teacher: Path | None = None
    tokenizer: Path | None = None
    student_layers: int | None = None
    student_width: int | None = None
    student_heads: int | None = None
    student_ff: int | None = None
    baseline: bool = False
    batch: int | None = None
    lr: float | None = None
    warmup: int | None = None
    precision: str = "auto"
    temperature: str | None = None
    alpha: str | None = None
    beta: str | None = None
    divergence: str = "forward"
    label_smoothing: float = 0.0
    cosine: float = 0.0
    mse: float = 0.0
    teacher_cache: Path | None = None
    top_k: int = 64
    eval_steps: int | None = None
    save_steps: int | None = None
    eval_sentences: int | None = None
    bertscore: Path | None = None
    bertscore_layers: int | None = None
    metric: str = "bleu"
    max_drop: float = 0.05
    gate_patience: int = 3
    lr_factor: float = 0.5
    min_retention: float = 0.9
    confidence: float = 0.95
    samples: int = 1000
    compress: str | None = None
    report_to: str = "tensorboard"
    statistics: int | None = None
    seed: int = 0
    resume: bool = False

    def check(self) -> None:
        """Raise InputError for a value that cannot be, naming the option."""
        sizes = ("steps", "teacher_steps", "batch", "eval_steps", "save_steps", "eval_sentences", "top_k", "statistics")
        self.require(sizes, lambda value: value >= 1, "must be at least 1")
        self.require(tuple(_SIZES), lambda value: value >= 1, "must be at least 1")
        self.require(("bertscore_layers",), lambda value: value >= 1, "must be at least 1")
        self.require(("lr",), lambda value: 0 < value < math.inf, "must be a positive number")
        self.require(("warmup",), lambda value: value >= 0, "must not be negative")
        self.require(("cosine", "mse"), lambda value: 0 <= value < math.inf, "must not be negative")
        self.require(("label_smoothing",), lambda value: 0 <= value < 1, "must lie in [0, 1)")
        self.one_of("precision", PRECISIONS)
        self.one_of("metric", METRICS)
        self.one_of("divergence", tuple(DIVERGENCES))
        self.check_seed()
        if self.bertscore_layers is not None and self.bertscore is None:
            raise InputError("--bertscore-layers are of the encoder in --bertscore DIR; give it too")
        if self.teacher_cache is None and self.top_k != 64:
            raise InputError("--top-k is of --teacher-cache DIR; give it too")
        if self.teacher is not None and self.teacher_steps is not None:
            raise InputError("--teacher-steps trains the teacher, which --teacher gives; leave one of them out")

    def chosen(self) -> CVMPreset:
        """The preset with what the options change of it.

        Raises InputError for a preset that there is not, and for schedules that cannot be.
        """
        named = preset_named(self.preset)
        preset = named.with_steps(self.steps, self.steps if self.teacher_steps is None else self.teacher_steps)
        given = {"batch_size": self.batch, "learning_rate": self.lr, "warmup_steps": self.warmup}
        changes = {name: value for name, value in given.items() if value is not None}
        student: Training = replace(preset.student_training, **changes)  # type: ignore[arg-type]
        if not student.warmup_steps <= student.steps:
            raise InputError(f"--warmup {student.warmup_steps} is more than the {student.steps} steps")
        steps = min(preset.eval_steps if self.eval_steps is None else self.eval_steps, student.steps)
        saved = steps if self.save_steps is None else self.save_steps
        if steps % saved:
            raise InputError(f"--save-steps {saved} must divide --eval-steps {steps}: what is validated is also saved")
        schedules: dict[str, Any] = {
            name: Schedule.parse(getattr(preset, name) if getattr(self, name) is None else getattr(self, name))
            for name in ("temperature", "alpha", "beta")
        }
        self._check_loss(schedules)
        return replace(
            preset,
            **schedules,
            student=self._student_sizes(preset),
            student_training=student,
            eval_steps=steps,
            save_steps=saved,
            eval_sentences=preset.eval_sentences if self.eval_sentences is None else self.eval_sentences,
        )

    def _check_loss(self, schedules: dict[str, Any]) -> None:
        try:
            DistillationLoss.cvm(**schedules, mse=self.mse, label_smoothing=self.label_smoothing)
        except ValueError as error:
            raise InputError(str(error)) from error
        if self.teacher_cache is None:
            return
        for name in ("cosine", "mse"):
            if getattr(self, name):
                raise InputError(f"--{name} compares what --teacher-cache does not keep; leave one of them out")
        temperature = schedules["temperature"]
        if temperature.start != temperature.end:
            raise InputError(f"--temperature {temperature}: --teacher-cache is of one temperature; give one number")

    def _student_sizes(self, preset: CVMPreset) -> dict[str, Any]:
        """The preset's, with those that are given. Raises InputError where they do not fit each other."""
        given = {field: getattr(self, name) for name, field in _SIZES.items() if getattr(self, name) is not None}
        sizes = {**preset.student, **given}
        if not given:
            return sizes
        try:
            with torch.device("meta"):  # some sizes are refused by the layers alone
                CVMForConditionalGeneration(CVMConfig(**sizes))
        except ValueError as error:
            raise InputError(f"the student cannot be built: {first_line(error)}") from error
        return sizes
