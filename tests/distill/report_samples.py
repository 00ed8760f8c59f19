"""Reports of every kind, made by hand with numbers like those of real runs."""

import math
import random
from typing import Any

WORDS = """und Gott sprach es werde Licht am Anfang schuf er Himmel Erde wüst leer Finsternis auf der Tiefe
schwebte dem Wasser Geist""".split()  # noqa: SIM905 - a list of words would fill a line each
CLASSES = [
    "causes", "complications", "considerations", "exams and tests", "inheritance", "outlook", "prevention",
    "susceptibility", "symptoms", "treatment",
]  # fmt: skip
ROLLBACKS = [
    {"step": 4000, "to": 3000, "metric": "bleu", "best": 24.1, "value": 18.2, "low": -7.3, "high": -4.4,
     "learning_rate_factor": 0.5},
    {"step": 7000, "to": 6000, "metric": "bleu", "best": 29.3, "value": 25.6, "low": -5.1, "high": -2.0,
     "learning_rate_factor": 0.25},
]  # fmt: skip


def _sentence(seed: int, words: int) -> str:
    chosen = random.Random(seed).choices(WORDS, k=words)
    return " ".join(chosen).capitalize() + "."


def _model(parameters: int, quality: dict[str, float], steps: int | None) -> dict[str, Any]:
    p50 = parameters / 4e5
    return {
        "parameters": parameters, "file_bytes": 4 * parameters + 40_000, "memory_bytes": 4 * parameters,
        "latency_ms": {"p50": p50, "p95": 1.9 * p50, "p99": 2.6 * p50}, "throughput": 9e7 / parameters,
        "quality": quality, "training": None if steps is None else {"steps": steps, "seconds": steps * 0.31},
    }  # fmt: skip


def _steps_run(total: int, every: int, rollbacks: list[dict[str, Any]]) -> list[int]:
    """The steps of a run that goes back at each rollback."""
    steps, at, waiting = list[int](), 0, list(rollbacks)
    while at < total:
        at += every
        steps.append(at)
        if waiting and at == waiting[0]["step"]:
            at = waiting.pop(0)["to"]
    return steps


def _training_log(total: int, parts: dict[str, float], rollbacks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    noise = random.Random(1)
    return [
        {"step": step, "learning_rate": 5e-5,
         **{name: start * (0.25 + math.exp(-step / 1500)) * noise.uniform(0.93, 1.07) for name, start in parts.items()}}
        for step in _steps_run(total, 50, rollbacks)
    ]  # fmt: skip


def _validations(total: int, final: dict[str, float], rollbacks: list[dict[str, Any]]) -> list[dict[str, Any]]:
    bad, entries = [rollback["step"] for rollback in rollbacks], []
    for step in _steps_run(total, 1000, rollbacks):
        share = 1 - math.exp(-step / 3000)
        if bad and step == bad[0]:
            bad.pop(0)
            share *= 0.75
        entries.append({"step": step, **{name: value * share for name, value in final.items()}})
    return entries


def _common(title: str, task: str, metric: str) -> dict[str, Any]:
    command = "neural-layers distill --data train.tsv --valid valid.tsv --test test.tsv --out runs/one --seed 7"
    return {
        "title": title, "task": task, "created": "2026-01-21T08:30:00+00:00", "command": command, "preset": "small",
        "seed": 7, "seconds": 9876.0, "versions": {"python": "3.12.3", "torch": "2.13.0", "transformers": "5.23.0"},
        "hyperparameters": {"optimizer": {"name": "adamw", "betas": [0.9, 0.98]}, "batch_size": 32, "alpha": 0.8},
        "gate": {
            "metric": metric, "max_drop": 0.05, "min_retention": 0.9, "patience": 3, "lr_factor": 0.5,
            "confidence": 0.95, "samples": 1000, "outcome": "finished", "best_step": 9000, "retention": 0.957,
            "passed": True, "failed": [],
        },
    }  # fmt: skip


def _form(name: str, base: dict[str, Any], size: float, speed: float, share: float, note: str) -> dict[str, Any]:
    quality = {metric: value * share for metric, value in base["quality"].items()}
    return {
        "variant": name, "file_bytes": int(base["file_bytes"] * size), "memory_bytes": int(base["memory_bytes"] * size),
        "latency_ms": {key: value * speed for key, value in base["latency_ms"].items()},
        "throughput": base["throughput"] / speed, "quality": quality,
        "retention": dict.fromkeys(quality, 0.96 * share), "kept": dict.fromkeys(quality, share),
        "passed": 0.96 * share >= 0.9, "note": note,
    }  # fmt: skip


def translation_report() -> dict[str, Any]:
    """A translator with a baseline, two rollbacks, an error analysis and compressed forms, one of which failed."""
    teacher = {
        "bleu": 33.1, "chrf": 57.9, "ter": 51.2, "rouge1": 61.0, "rouge2": 38.8, "rougeL": 57.3, "exact_match": 0.043,
        "length_ratio": 0.987,
    }  # fmt: skip
    student = {name: value * (1.06 if name == "ter" else 0.957) for name, value in teacher.items()}
    baseline = {name: value * (1.2 if name == "ter" else 0.85) for name, value in teacher.items()}
    models = {
        "teacher": _model(12_934_144, teacher, None), "student": _model(3_112_448, student, 10_000),
        "baseline": _model(3_112_448, baseline, 10_000),
    }  # fmt: skip
    lengths = [(1, 10), (11, 20), (21, 30), (31, 40), (41, None)]
    parts = {"loss": 6.5, "kl": 5.9, "hard": 7.1, "cosine": 0.4, "mse": 0.3}
    return {
        **_common("CVM distillation", "translation", "bleu"),
        "data": {"name": "bible en-de", "train": 58_321, "valid": 1_000, "test": 1_000}, "models": models,
        "retention": {name: (teacher[name] / student[name] if name == "ter" else 0.957) for name in teacher},
        "retention_interval": {name: [0.941, 0.973] for name in teacher}, "rollbacks": ROLLBACKS,
        "validation": {
            "teacher": [{"step": 0, **teacher}], "student": _validations(10_000, student, ROLLBACKS),
            "baseline": _validations(10_000, baseline, []),
        },
        "training_log": {
            "teacher": [], "student": _training_log(10_000, parts, ROLLBACKS),
            "baseline": _training_log(10_000, {"loss": 7.0}, []),
        },
        "analysis": {
            "by_length": [
                {"from": low, "to": high, "sentences": 310 - 60 * i, "teacher": 60.0 - 3 * i, "student": 58.5 - 4 * i}
                for i, (low, high) in enumerate(lengths)
            ],
            "rare": [
                {"label": "frequent words only", "sentences": 611, "teacher": 60.2, "student": 58.8},
                {"label": "a word that training has thrice at most", "sentences": 302, "teacher": 54.3, "student": 51},
                {"label": "a word that training has not", "sentences": 87, "teacher": 49.8, "student": 44.1},
            ],
            "copies": {"teacher": 0.001, "student": 0.003}, "repetitions": {"teacher": 0.004, "student": 0.021},
            "empty": {"teacher": 0.0, "student": 0.001},
        },
        "examples": [
            {"kind": kind, "source": _sentence(i, 9 + 5 * i), "reference": _sentence(i + 1, 8 + 5 * i),
             "teacher": _sentence(i + 2, 9 + 4 * i), "student": "" if i == 0 else _sentence(i + 3, 7 + 5 * i),
             "student_chrf": 8.0 * i}
            for i, kind in enumerate(["worst", "worst", "random", "random"])
        ],
        "compression": [
            _form("student", models["student"], 1.0, 1.0, 1.0, "as trained, float32"),
            _form("bf16", models["student"], 0.5, 1.4, 0.999, "every weight in bfloat16"),
            _form("nf4", models["student"], 0.31, 1.7, 0.91, "linear layers in 4 bits (NF4, blocks of 64)"),
            _form("onnx", models["student"], 1.3, 0.4, 1.0, "a float32 graph, run by ONNX Runtime"),
            _form("onnx-int8", models["student"], 0.36, 0.3, 0.997, "a graph with weights in 8 bits"),
            {"variant": "onnx-int4", "file_bytes": None, "memory_bytes": None, "latency_ms": None, "throughput": None,
             "quality": None, "retention": {}, "kept": {}, "passed": False,
             "note": "could not be made: the graph's logits differ by 0.3 from the model's"},
        ],
    }  # fmt: skip


def _confusion(accuracy: float, support: list[int], seed: int) -> list[list[int]]:
    chance, rows = random.Random(seed), []
    for i, total in enumerate(support):
        told = [i if chance.random() < accuracy else chance.randrange(len(support)) for _ in range(total)]
        rows.append([told.count(j) for j in range(len(support))])
    return rows


def classification_report() -> dict[str, Any]:
    """A classifier of ten classes that the gate stopped and failed."""
    support = [140, 61, 12, 118, 95, 77, 54, 61, 251, 207]
    accuracies = {"teacher": 0.93, "student": 0.81, "baseline": 0.74}
    quality = {
        name: {"accuracy": a, "macro_f1": a - 0.03, "calibration_error": 0.021 + (1 - a) / 4, "loss": 1.4 - a}
        for name, a in accuracies.items()
    }
    sizes = {"teacher": 6_511_370, "student": 1_402_250, "baseline": 1_402_250}
    models = {name: _model(sizes[name], quality[name], 2000) for name in accuracies}
    parts = {"loss": 2.3, "kl": 1.9, "hard": 2.4, "cosine": 0.8, "mse": 1.2}
    rollbacks = [
        {"step": step, "to": 1000, "metric": "accuracy", "best": 0.78, "value": 0.7, "low": -0.1, "high": -0.05,
         "learning_rate_factor": 0.5**i}
        for i, step in enumerate((2000, 2000, 3000), start=1)
    ]  # fmt: skip
    report = _common("NTMM distillation", "classification", "accuracy")
    report["gate"] |= {"outcome": "stopped", "best_step": 1000, "retention": 0.871, "passed": False}
    report["gate"]["failed"] = ["accuracy"]
    scores = {name: [share(i) for i in range(len(CLASSES))] for name, share in _class_scores(accuracies).items()}
    return {
        **report, "models": models, "rollbacks": rollbacks,
        "data": {"name": "medical questions", "train": 8_912, "valid": 1_076, "test": 1_076},
        "retention": {"accuracy": 0.871, "macro_f1": 0.867, "calibration_error": 0.56, "loss": 0.8},
        "retention_interval": {"accuracy": [0.85, 0.89], "macro_f1": [0.83, 0.9]},
        "validation": {name: _validations(3000, quality[name], []) for name in ("student", "baseline")},
        "training_log": {
            "teacher": _training_log(2000, {"loss": 2.3}, []), "student": _training_log(3000, parts, rollbacks),
            "baseline": _training_log(3000, {"loss": 2.2}, []),
        },
        "classes": {
            "labels": CLASSES, "support": support, "f1": scores, "precision": scores, "recall": scores,
            "confusion": {name: _confusion(a, support, i) for i, (name, a) in enumerate(accuracies.items())},
            "reliability": {
                name: [
                    {"from": i / 10, "to": (i + 1) / 10, "count": 4 * i * i, "confidence": (i + 0.55) / 10,
                     "accuracy": min(1.0, max(0.0, (i + 0.55) / 10 + a - 0.9))}
                    for i in range(10)
                ]
                for name, a in accuracies.items()
            },
        },
        "examples": [
            {"kind": kind, "text": _sentence(i, 12), "label": CLASSES[i], "teacher": CLASSES[i],
             "student": CLASSES[i + (i < 2)], "confidence": 0.93 - 0.1 * i}
            for i, kind in enumerate(["worst", "worst", "random"])
        ],
        "compression": [
            _form("student", models["student"], 1.0, 1.0, 1.0, "as trained, float32"),
            _form("nf4", models["student"], 0.4, 1.3, 0.985, "linear layers in 4 bits (NF4, blocks of 64)"),
        ],
    }  # fmt: skip


def _class_scores(accuracies: dict[str, float]) -> dict[str, Any]:
    return {name: lambda i, a=a: None if (i, a) == (2, 0.74) else a - 0.01 * i for name, a in accuracies.items()}
