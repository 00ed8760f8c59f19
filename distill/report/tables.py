"""The tables of the page. Everything that comes from data goes through `text`, which escapes it."""

import html
import json
from typing import Any

from neural_layers.distill.report.numbers import count, digits, duration, megabytes, percent, score

MODEL_HEADERS = (
    "model", "parameters", "file size, MB", "memory, MB", "latency p50, ms per sentence",
    "latency p95, ms per sentence", "BLEU", "chrF", "TER (lower is better)", "exact match, %", "training steps",
    "training time, h:mm:ss",
)  # fmt: skip
MODEL_NOTES = {"teacher": "", "student": "", "baseline": "the same student trained without the teacher"}
EXAMPLE_HEADERS = ("picked", "source", "reference", "teacher", "student", "student's chrF")
KIND_NAMES = {"worst": "worst", "random": "random"}


def text(value: object) -> str:
    """The value as HTML text."""
    return html.escape(str(value))


def model_table(models: dict[str, Any]) -> str:
    """One row for each model: cost, quality on the test set, training."""
    rows = []
    for name, note in MODEL_NOTES.items():
        if name in models:
            small = f"<small>{text(note)}</small>" if note else ""
            rows.append([f"{text(name)}{small}", *map(text, _model_cells(models[name]))])
    return _table("numbers cards", MODEL_HEADERS, rows)


def _model_cells(model: dict[str, Any]) -> list[str]:
    latency, quality, training = model["latency_ms"], model["quality"], model["training"]
    trained = ["given", "given"] if training is None else [count(training["steps"]), duration(training["seconds"])]
    return [
        count(model["parameters"]),
        megabytes(model["file_bytes"]),
        megabytes(model["memory_bytes"]),
        digits(latency["p50"]),
        digits(latency["p95"]),
        score(quality["bleu"]),
        score(quality["chrf"]),
        score(quality["ter"]),
        percent(quality["exact_match"]),
        *trained,
    ]


def example_table(examples: list[dict[str, Any]]) -> str:
    """Sentences with their translations, the worst first."""
    if not examples:
        return '<p class="note">No examples were kept.</p>'
    rows = []
    for example in sorted(examples, key=lambda one: one["kind"] != "worst"):
        kind = text(KIND_NAMES.get(example["kind"], example["kind"]))
        sentences = [_sentence(example[key]) for key in ("source", "reference", "teacher", "student")]
        rows.append([f'<span class="kind {kind}">{kind}</span>', *sentences, text(score(example["student_chrf"]))])
    return _table("sentences cards", EXAMPLE_HEADERS, rows)


def _sentence(sentence: str) -> str:
    # dir="auto": a sentence may be in a script that runs from right to left.
    return f'<span dir="auto">{text(sentence)}</span>' if sentence.strip() else "<em>(empty)</em>"


def fact_table(facts: dict[str, str]) -> str:
    """Names and values, one pair in a row."""
    if not facts:
        return '<p class="note">None were recorded.</p>'
    rows = "".join(f'<tr><th scope="row">{text(k)}</th><td>{text(v)}</td></tr>' for k, v in facts.items())
    return f'<table class="facts"><tbody>{rows}</tbody></table>'


def flatten(nested: dict[str, Any], prefix: str = "") -> dict[str, str]:
    """Nested settings as dotted names with their values in words: {"a": {"b": None}} -> {"a.b": "null"}."""
    flat: dict[str, str] = {}
    for key, value in nested.items():
        if isinstance(value, dict) and value:
            flat |= flatten(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return flat


def _table(classes: str, headers: tuple[str, ...], rows: list[list[str]]) -> str:
    """A table of HTML cells. On a narrow page a row becomes a card, where `data-label` repeats the header."""
    # The roles keep it a table for screen readers when CSS turns the rows into blocks.
    head = "".join(f'<th scope="col">{text(header)}</th>' for header in headers)
    body = ""
    for first, *rest in rows:
        cells = zip(headers[1:], rest, strict=True)
        tds = "".join(f'<td role="cell" data-label="{text(header)}"><span>{cell}</span></td>' for header, cell in cells)
        body += f'<tr role="row"><th role="rowheader" scope="row">{first}</th>{tds}</tr>\n'
    return f'<table role="table" class="{classes}"><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table>'
