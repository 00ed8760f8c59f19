"""Tables as HTML. Everything that comes from data goes through `text`, which escapes it."""

import html
import json
from collections.abc import Sequence
from typing import Any


def text(value: object) -> str:
    """The value as HTML text."""
    return html.escape(str(value))


def prose(sentence: str) -> str:
    """A sentence as HTML text whose numbers are not parted from their percent signs at the end of a line."""
    return text(sentence).replace(" %", "&nbsp;%")


def table(classes: str, headers: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of HTML cells. On a narrow page a row of class `cards` becomes a card, where `data-label` repeats the
    header."""
    # The roles keep it a table for screen readers when CSS turns the rows into blocks.
    head = "".join(f'<th scope="col">{text(header)}</th>' for header in headers)
    body = ""
    for first, *rest in rows:
        cells = zip(headers[1:], rest, strict=True)
        tds = "".join(f'<td role="cell" data-label="{text(header)}"><span>{cell}</span></td>' for header, cell in cells)
        body += f'<tr role="row"><th role="rowheader" scope="row">{first}</th>{tds}</tr>\n'
    return f'<table role="table" class="{classes}"><thead><tr>{head}</tr></thead><tbody>\n{body}</tbody></table>'


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


def phrase(sentence: str) -> str:
    """A sentence of the data, or "(empty)"."""
    # dir="auto": a sentence may be in a script that runs from right to left.
    return f'<span dir="auto">{text(sentence)}</span>' if sentence.strip() else "<em>(empty)</em>"
