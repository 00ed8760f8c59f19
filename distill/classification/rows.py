"""Rows of named fields from files: `.jsonl`, `.json`, `.csv`, `.tsv` and `.parquet`, plain or with `.gz`."""

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from neural_layers.distill.text.errors import TextError, first_line
from neural_layers.distill.text.reading import open_bytes, parse_json, told_as_text_errors

SUFFIXES = (".jsonl", ".json", ".csv", ".tsv", ".parquet")


class Row(NamedTuple):
    """A row and where it stands (`FILE: line 3` or `FILE: row 3`), for errors."""

    where: str
    fields: dict[str, Any]


def suffix(path: Path) -> str | None:
    """The kind of file that the name promises, without `.gz`; None for one that cannot be read."""
    name = path.name.lower().removesuffix(".gz")
    return next((one for one in SUFFIXES if name.endswith(one)), None)


def read_rows(path: Path) -> Iterator[Row]:
    """The rows of a file in order; empty lines are left out. A .csv or .tsv file begins with the names of its fields.

    Raises: TextError where the file is missing, of an unknown kind, broken, truncated or not UTF-8, and for a row that
    has no named fields or, in a .csv or .tsv file, more or fewer than the first line names; each with its line.
    """
    readers = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".tsv": _csv, ".parquet": _parquet}
    kind = suffix(path)
    if kind is None:
        raise TextError(f"{path}: the name ends in none of {', '.join(SUFFIXES)} (each also .gz); rename the file")
    with told_as_text_errors(path):
        for row in readers[kind](path):
            if not isinstance(row.fields, dict):
                raise TextError(
                    f"{row.where}: a row is an object with a text and a label, and not {type(row.fields).__name__}"
                )
            yield row


def _jsonl(path: Path) -> Iterator[Row]:
    with open_bytes(path) as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}: line {number}"
            line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
            if line.strip():
                yield Row(where, parse_json(line, where))


def _json(path: Path) -> Iterator[Row]:
    with open_bytes(path) as file:
        parsed = parse_json(file.read().removeprefix(b"\xef\xbb\xbf"), str(path))
    for number, fields in enumerate(parsed if isinstance(parsed, list) else [parsed], start=1):
        yield Row(f"{path}: row {number}", fields)


def _csv(path: Path) -> Iterator[Row]:
    is_tsv = suffix(path) == ".tsv"
    with open_bytes(path) as file:
        try:
            text = file.read().decode("utf-8-sig")
        except UnicodeDecodeError as error:
            raise TextError(f"{path}: not UTF-8 at byte {error.start}; save the file as UTF-8") from error
    # A quotation mark inside a tab-separated text is an ordinary character; csv quotes a text that holds a comma.
    options: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if is_tsv else {"strict": True}
    reader = csv.reader(io.StringIO(text, newline=""), **options)
    names: list[str] | None = None
    try:
        for values in reader:
            if not values:
                continue
            if names is None:
                names = values
                continue
            where = f"{path}: line {reader.line_num}"
            if len(values) != len(names):
                raise TextError(f"{where}: {len(values)} fields, and the first line names {len(names)}; mend the row")
            yield Row(where, dict(zip(names, values, strict=True)))
    except csv.Error as error:
        raise TextError(f"{path}: line {reader.line_num}: {error}; mend the row") from error


def _parquet(path: Path) -> Iterator[Row]:
    import pyarrow
    import pyarrow.parquet

    with open_bytes(path) as file:
        # Parquet is read from its end: a compressed one is unpacked into memory first.
        source = io.BytesIO(file.read()) if path.name.lower().endswith(".gz") else file
        try:
            number = 0
            for batch in pyarrow.parquet.ParquetFile(source).iter_batches(batch_size=256):
                for fields in batch.to_pylist():
                    number += 1
                    yield Row(f"{path}: row {number}", fields)
        except pyarrow.ArrowException as error:
            raise TextError(f"{path}: broken parquet file ({first_line(error)}); copy it again") from error
