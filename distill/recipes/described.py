"""The parts of a report that every recipe has: each model with its cost and quality, and what the student keeps."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from neural_layers.distill.recipes.trained import Trained
from neural_layers.distill.validation import Measure, ratio_interval
from neural_layers.distill.validation.recording import scores
from neural_layers.wrappers.modules import tensor_bytes


def described_models(
    models: Mapping[str, nn.Module],
    folders: Mapping[str, Path],
    measures: Mapping[str, Mapping[str, Measure]],
    trained: Mapping[str, Trained],
    latency: Mapping[str, dict[str, float]],
    throughput: Mapping[str, float],
) -> dict[str, Any]:
    """The part `models`. folders: where the weights of each lie; trained: those that the run has trained."""
    return {
        name: {
            "architecture": type(getattr(model, "wrapped", model)).__name__,
            "parameters": sum(p.numel() for p in model.parameters()),
            "file_bytes": sum(file.stat().st_size for file in folders[name].glob("*.safetensors")),
            "memory_bytes": tensor_bytes(model),
            "latency_ms": latency[name],
            "throughput": throughput[name],
            "quality": scores(measures[name]),
            "training": {"steps": trained[name].steps, "seconds": trained[name].seconds} if name in trained else None,
        }
        for name, model in models.items()
    }


def described_retention(
    student: Mapping[str, Measure], teacher: Mapping[str, Measure], metrics: Sequence[str], **resampling: Any
) -> dict[str, Any]:
    """The parts `retention` and `retention_interval`; resampling: arguments of the bootstrap."""
    kept = {metric: ratio_interval(student[metric], teacher[metric], **resampling) for metric in metrics}
    return {
        "retention": {m: None if found is None else round(found[0], 6) for m, found in kept.items()},
        "retention_interval": {m: [round(end, 6) for end in found[1:]] for m, found in kept.items() if found},
    }


def teacher_validations(folder: Path, student: Trained) -> list[dict[str, float]]:
    """The part `validation.teacher`: its scores on the validation data, out of the student's best validation."""
    best = student.best_step
    record = json.loads((folder / f"step-{best}.json").read_text(encoding="utf-8"))
    return [{"step": best, **record["teacher"]}]
