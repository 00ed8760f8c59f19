"""The tables of the page on quality, cost, compressed forms and examples."""

from typing import Any

from neural_layers.distill.report.costs import noun
from neural_layers.distill.report.html_table import phrase, table, text
from neural_layers.distill.report.numbers import count, digits, duration, megabytes, percent, score
from neural_layers.distill.report.scores import gate_metric, is_language, is_translation, score_named, scores_of

MODEL_NOTES = {"teacher": "", "student": "", "baseline": "the same student trained without the teacher"}
EXAMPLE_HEADERS = ("picked", "source", "reference", "teacher", "student", "student's chrF")
TEXT_HEADERS = ("picked", "text", "class", "teacher", "student", "student's confidence, %")
SEQUENCE_HEADERS = ("picked", "text", "teacher's loss", "student's loss")
UNKNOWN = "–"


def quality_table(report: dict[str, Any]) -> str:
    """One row for each score on the test set: the models side by side, and what the student keeps of the teacher."""
    models = {name: report["models"][name] for name in MODEL_NOTES if name in report["models"]}
    retention, intervals = report["retention"], report.get("retention_interval", {})
    headers = ["score", *models, "kept, %"] + ["kept: 95 % interval"] * bool(intervals)
    rows = []
    for name in scores_of([model["quality"] for model in models.values()], gate_metric(report)):
        shown, kept, interval = score_named(name), retention.get(name), intervals.get(name)
        values = [model["quality"].get(name) for model in models.values()]
        cells = [UNKNOWN if value is None else shown.show(value) for value in values]
        cells.append(UNKNOWN if kept is None else percent(kept))
        if intervals:
            cells.append(f"{percent(interval[0])} – {percent(interval[1])}" if interval else UNKNOWN)
        rows.append([text(shown.header), *map(text, cells)])
    return table("numbers cards quality", headers, rows)


def cost_table(report: dict[str, Any]) -> str:
    """One row for each model: size, speed, training."""
    one, models = noun(report), report["models"]
    has_p99 = any("p99" in model["latency_ms"] for model in models.values())
    has_throughput = any(model.get("throughput") is not None for model in models.values())
    headers = [
        "model", "parameters", "file size, MB", "memory, MB", f"latency p50, ms per {one}",
        f"latency p95, ms per {one}", *[f"latency p99, ms per {one}"] * has_p99,
        *[f"throughput, {one}s per second"] * has_throughput, "training steps", "training time, h:mm:ss",
    ]  # fmt: skip
    rows = []
    for name, note in MODEL_NOTES.items():
        if name in models:
            model, small = models[name], f"<small>{text(note)}</small>" if note else ""
            latency, training = model["latency_ms"], model["training"]
            trained = ["given"] * 2 if training is None else [count(training["steps"]), duration(training["seconds"])]
            cells = [count(model["parameters"]), megabytes(model["file_bytes"]), megabytes(model["memory_bytes"])]
            cells += [digits(latency["p50"]), digits(latency["p95"])]
            cells += [_maybe(latency.get("p99"))] * has_p99 + [_maybe(model.get("throughput"))] * has_throughput
            rows.append([f"{text(name)}{small}", *map(text, [*cells, *trained])])
    return table("numbers cards", headers, rows)


def compression_table(report: dict[str, Any]) -> str:
    """One row for each compressed form: quality, what it keeps, size, speed, and whether that is enough."""
    metric, one = gate_metric(report), noun(report)
    shown = score_named(metric)
    headers = [
        "form", "enough?", shown.header, "kept of the teacher, %", "kept of the student, %", "file size, MB",
        "memory, MB", f"p50, ms per {one}", "p95, ms", "p99, ms", f"{one}s per second",
    ]  # fmt: skip
    rows = []
    for entry in report["compression"]:
        quality, latency = entry["quality"] or {}, entry["latency_ms"] or {}
        kept = [(entry[key] or {}).get(metric) for key in ("retention", "kept")]
        value = quality.get(metric)
        small = f"<small>{text(entry['note'])}</small>" if entry.get("note") else ""
        word = "passed" if entry["passed"] else "failed"
        cells = [
            f'<span class="{"kept" if entry["passed"] else "lost"}">{word}</span>',
            UNKNOWN if value is None else text(shown.show(value)),
            *[UNKNOWN if share is None else percent(share) for share in kept],
            *[UNKNOWN if entry[key] is None else megabytes(entry[key]) for key in ("file_bytes", "memory_bytes")],
            *[_maybe(latency.get(key)) for key in ("p50", "p95", "p99")],
            _maybe(entry["throughput"]),
        ]
        rows.append([f"{text(entry['variant'])}{small}", *cells])
    return table("numbers cards", headers, rows)


def example_table(report: dict[str, Any]) -> str:
    """Sentences with their translations, texts with their classes, or sequences with their losses; the worst first."""
    examples = report["examples"]
    if not examples:
        return '<p class="note">No examples were kept.</p>'
    headers: tuple[str, ...] = TEXT_HEADERS
    cells_of, rows = _classes, []
    if is_translation(report):
        headers, cells_of = EXAMPLE_HEADERS, _translations
    elif is_language(report):
        headers, cells_of = SEQUENCE_HEADERS, _losses
    for example in sorted(examples, key=lambda one: one["kind"] != "worst"):
        kind = text(example["kind"])
        rows.append([f'<span class="kind {kind}">{kind}</span>', *cells_of(example)])
    return table("sentences cards", headers, rows)


def _losses(example: dict[str, Any]) -> list[str]:
    return [phrase(example["text"]), *[text(digits(example[name])) for name in ("teacher", "student")]]


def _translations(example: dict[str, Any]) -> list[str]:
    sentences = [phrase(example[key]) for key in ("source", "reference", "teacher", "student")]
    return [*sentences, text(score(example["student_chrf"]))]


def _classes(example: dict[str, Any]) -> list[str]:
    confidence = example.get("confidence")
    named = [
        UNKNOWN if example.get(name) is None
        else text(example[name]) + " <em>(wrong)</em>" * (example[name] != example["label"])
        for name in ("teacher", "student")
    ]  # fmt: skip
    return [
        phrase(example["text"]),
        text(example["label"]),
        *named,
        UNKNOWN if confidence is None else percent(confidence),
    ]


def rare_table(rare: list[dict[str, Any]]) -> str:
    """chrF of each model on sentences by how rare their rarest word is."""
    models = [name for name in MODEL_NOTES if any(name in one for one in rare)]
    rows = [[text(one["label"]), count(one["sentences"]), *[_score(one.get(name)) for name in models]] for one in rare]
    return table("numbers cards", ["the source has", "sentences", *[f"{name}'s chrF" for name in models]], rows)


def fault_table(analysis: dict[str, Any]) -> str:
    """The shares of translations that copy, repeat, or are empty."""
    names = {"copies": "copies of the source", "repetitions": "repetitions", "empty": "empty translations"}
    faults = {label: analysis[key] for key, label in names.items() if key in analysis}
    models = [name for name in MODEL_NOTES if any(name in shares for shares in faults.values())]
    rows = [[text(label), *[_share(shares.get(name)) for name in models]] for label, shares in faults.items()]
    return table("numbers cards", ["fault", *[f"{name}, % of sentences" for name in models]], rows)


def _maybe(value: float | None) -> str:
    return UNKNOWN if value is None else digits(value)


def _score(value: float | None) -> str:
    return UNKNOWN if value is None else score(value)


def _share(value: float | None) -> str:
    return UNKNOWN if value is None else percent(value)
