"""Sizes and hyperparameters of the CVM recipe."""

from dataclasses import dataclass, replace
from typing import Any

from neural_layers.distill.losses.schedule import Schedule
from neural_layers.errors import InputError

_TEMPERATURE, _ALPHA, _BETA = Schedule(6.0, 6.0), Schedule(0.8, 0.8), Schedule(0.2, 0.2)  # the specification's


@dataclass(frozen=True)
class Training:
    """How one model is trained: AdamW, warmup, then the named decay, clipping at norm 1."""

    steps: int
    batch_size: int
    learning_rate: float
    warmup_steps: int
    schedule: str = "cosine"
    label_smoothing: float = 0.0


@dataclass(frozen=True)
class CVMPreset:
    """Models, training and validation of a run. `teacher` and `student` are fields of `CVMConfig`."""

    teacher: dict[str, Any]
    student: dict[str, Any]
    vocab_size: int
    max_length: int
    teacher_training: Training
    student_training: Training
    temperature: Schedule = _TEMPERATURE
    alpha: Schedule = _ALPHA
    beta: Schedule = _BETA
    eval_steps: int = 1000
    save_steps: int = 1000
    eval_sentences: int = 400

    def with_steps(self, steps: int | None, teacher_steps: int | None) -> "CVMPreset":
        """Other numbers of steps; warmup and the validation interval shrink along where they would not fit."""
        preset = self
        if steps is not None:
            preset = replace(
                preset,
                student_training=_shortened(preset.student_training, steps),
                eval_steps=min(preset.eval_steps, steps),
            )
        if teacher_steps is not None:
            preset = replace(preset, teacher_training=_shortened(preset.teacher_training, teacher_steps))
        return preset


def _shortened(training: Training, steps: int) -> Training:
    if steps < 1:
        raise InputError(f"{steps} steps are too few; give at least 1")
    return replace(training, steps=steps, warmup_steps=min(training.warmup_steps, steps // 10))


def _sizes(hidden: int, heads: int, layers: int, feed_forward: int, dropout: float) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "intermediate_size": feed_forward,
        "dropout": dropout,
    }


PRESETS = {
    # The embedded corpus in two minutes on two cores.
    "tiny": CVMPreset(
        teacher=_sizes(128, 4, 2, 256, 0.0),
        student=_sizes(80, 4, 2, 160, 0.0),
        vocab_size=1500,
        max_length=64,
        teacher_training=Training(1800, 32, 2e-3, 180, label_smoothing=0.1),
        student_training=Training(1600, 32, 4e-3, 160),
        temperature=Schedule(2.0, 2.0),
        eval_steps=400,
        eval_sentences=150,
    ),
    # Some ten thousand real sentence pairs; teacher and student in about forty minutes on two cores.
    "small": CVMPreset(
        teacher=_sizes(192, 4, 3, 512, 0.2),
        student=_sizes(96, 4, 2, 256, 0.1),
        vocab_size=4000,
        max_length=128,
        teacher_training=Training(5000, 32, 2e-3, 500, label_smoothing=0.1),
        student_training=Training(5000, 32, 2e-3, 500),
        temperature=Schedule(2.0, 2.0),
        eval_steps=1000,
        eval_sentences=424,
    ),
    # The specification.
    "paper": CVMPreset(
        teacher=_sizes(768, 12, 12, 3072, 0.1),
        student=_sizes(512, 8, 6, 2048, 0.1),
        vocab_size=32000,
        max_length=512,
        teacher_training=Training(10000, 32, 5e-5, 1000),
        student_training=Training(10000, 32, 5e-5, 1000),
    ),
}


def preset_named(name: str) -> CVMPreset:
    """The preset of that name; raises InputError with the names there are."""
    if name not in PRESETS:
        raise InputError(f"there is no preset {name!r}; there are {', '.join(PRESETS)}")
    return PRESETS[name]
