"""The CVM recipe: a teacher, a student distilled from it, and a report of what was kept."""

import time
from dataclasses import asdict, dataclass, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import torch
from transformers import set_seed

from neural_layers.distill.data.tokenizer import train_tokenizer
from neural_layers.distill.files import save_json
from neural_layers.distill.losses import DistillationLoss
from neural_layers.distill.presets import CVMPreset, preset_named
from neural_layers.distill.recipes.comparison import compare
from neural_layers.distill.recipes.loading import load_teacher, load_tokenizer
from neural_layers.distill.recipes.splits import load_splits
from neural_layers.distill.recipes.training import TrainedModel, train_translator
from neural_layers.distill.recipes.versions import git_revision, versions
from neural_layers.distill.report import write_report
from neural_layers.distill.run_folder import RunFolder
from neural_layers.errors import InputError
from neural_layers.models.cvm import CVMConfig, CVMForConditionalGeneration


@dataclass(frozen=True)
class CVMOptions:
    """What a person can choose.

    out:       the run's folder, new or empty
    data:      a file of english<TAB>german lines, or None for the embedded corpus; with it go valid and test
    preset:    "tiny", "small" or "paper". steps, teacher_steps: other numbers of steps; steps alone goes for both
    teacher:   a folder with a trained CVM model and its tokenizer, or None to train one first
    tokenizer: a folder with a tokenizer, or None to train one on the data (or to take the teacher's)
    baseline:  also train the student without the teacher, with the same steps
    """

    out: Path
    data: Path | None = None
    valid: Path | None = None
    test: Path | None = None
    preset: str = "tiny"
    steps: int | None = None
    teacher_steps: int | None = None
    teacher: Path | None = None
    tokenizer: Path | None = None
    baseline: bool = False
    seed: int = 0


def distill_cvm(options: CVMOptions, command: str = "") -> dict[str, Any]:
    """Run the recipe; return the content of `report.json`. All input is checked before anything is written.

    Raises InputError for input that a person can mend.
    """
    started = time.perf_counter()
    steps = options.steps if options.teacher_steps is None else options.teacher_steps
    preset = preset_named(options.preset).with_steps(options.steps, steps)
    splits = load_splits(options.data, options.valid, options.test)
    teacher, tokenizer = _given(options, preset)
    run = RunFolder(options.out)
    if tokenizer is None:
        tokenizer = train_tokenizer(splits.train, preset.vocab_size)
    hyperparameters = {**asdict(preset), "vocab_size": len(tokenizer)}
    save_json(run.path / "config.json", _config(options, hyperparameters))

    trained: dict[str, TrainedModel] = {}
    if teacher is None:
        teacher = _new_model(preset, preset.teacher, tokenizer, options.seed)
        trained["teacher"] = train_translator(
            "teacher", teacher, tokenizer, splits, preset, preset.teacher_training, run, options.seed
        )
        run.save_model("teacher", teacher, tokenizer)
    student = _new_model(preset, preset.student, tokenizer, options.seed)
    loss = DistillationLoss.cvm(
        temperature=preset.temperature,
        alpha=preset.alpha,
        beta=preset.beta,
        label_smoothing=preset.student_training.label_smoothing,
    )
    trained["student"] = train_translator(
        "student", student, tokenizer, splits, preset, preset.student_training, run, options.seed, teacher, loss
    )
    run.save_model("student", student, tokenizer)
    models = {"teacher": teacher, "student": student}
    folders = {name: run.path / name for name in ("teacher", "student", "baseline")}
    if options.teacher is not None:
        folders["teacher"] = options.teacher
    if options.baseline:
        models["baseline"] = _new_model(preset, preset.student, tokenizer, options.seed)
        # Hard labels alone are smoothed as the teacher's training is: the comparison should not flatter distillation.
        training = replace(preset.student_training, label_smoothing=preset.teacher_training.label_smoothing)
        trained["baseline"] = train_translator(
            "baseline", models["baseline"], tokenizer, splits, preset, training, run, options.seed
        )
        run.save_model("baseline", models["baseline"], tokenizer)

    report = {
        "title": "CVM distillation",
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "preset": options.preset,
        "seed": options.seed,
        "versions": versions(),
        "hyperparameters": hyperparameters,
        "data": {"name": splits.name, **{k: len(getattr(splits, k)) for k in ("train", "valid", "test")}},
        **compare(models, trained, tokenizer, splits.test, folders),
        "validation": {"teacher": [], **{name: t.validations for name, t in trained.items()}},
        "training_log": {"teacher": [], **{name: t.log for name, t in trained.items()}},
        "seconds": round(time.perf_counter() - started, 1),
    }
    write_report(run.path, report)
    return report


def _given(options: CVMOptions, preset: CVMPreset) -> tuple[CVMForConditionalGeneration | None, Any]:
    """The teacher and the tokenizer that the options name, checked against each other and against the preset."""
    if not 0 <= options.seed < 2**32:
        raise InputError(f"seed {options.seed} is out of range; give one from 0 to {2**32 - 1}")
    tokenizer = None if options.tokenizer is None else load_tokenizer(options.tokenizer)
    if options.teacher is None:
        return None, tokenizer
    teacher, tokenizer = load_teacher(options.teacher, tokenizer)
    limit = teacher.config.max_position_embeddings
    if limit < preset.max_length:
        raise InputError(
            f"the teacher in {options.teacher} takes {limit} tokens, and preset {options.preset!r} has sentences of up "
            f"to {preset.max_length}; give the preset that it was trained with"
        )
    return teacher, tokenizer


def _new_model(preset: CVMPreset, sizes: dict[str, Any], tokenizer: Any, seed: int) -> CVMForConditionalGeneration:
    set_seed(seed)
    config = CVMConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=2 * preset.max_length,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        decoder_start_token_id=tokenizer.bos_token_id,
        **sizes,
    )
    return CVMForConditionalGeneration(config)


def _config(options: CVMOptions, hyperparameters: dict[str, Any]) -> dict[str, Any]:
    chosen = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(options).items()}
    return {
        "options": chosen,
        "hyperparameters": hyperparameters,
        "versions": versions(),
        "threads": torch.get_num_threads(),
        "git_revision": git_revision(),
    }
