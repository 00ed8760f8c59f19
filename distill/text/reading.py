"""Documents from files: `.txt`, `.json`, `.jsonl` and `.parquet`, plain or with `.gz`."""

import codecs
import gzip
import io
import json
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neural_layers.distill.text.errors import TextError, first_line
from neural_layers.distill.text.pieces import Piece, one_document, split_documents, whole

SUFFIXES = (".txt", ".json", ".jsonl", ".parquet")
_CHUNK = 1 << 20


@dataclass(frozen=True)
class ReadingOptions:
    """How files become documents.

    text_field: the field of a row that holds the text
    separator:  what divides a `.txt` file into documents; None takes each file as one
    """

    text_field: str = "text"
    separator: str | None = None


def is_readable(path: Path) -> bool:
    """Whether `path` has a name that `read_file` knows."""
    return _kind(path) is not None


def read_file(path: Path, options: ReadingOptions) -> Iterator[Piece]:
    """The documents of a file, in pieces and in order, reading as little ahead as the format allows.

    A `.txt` file is one document, or several where `options.separator` is given; each line of a `.jsonl` file, each
    element of the list in a `.json` file and each row of a `.parquet` file is a document: an object with the field
    `options.text_field`, or a plain string. Empty texts are left out.
    Raises: TextError where the file is missing, broken or truncated, not UTF-8 or lacks the field, with its line.
    """
    kind = _kind(path)
    if kind is None:
        raise TextError(f"{path}: the name ends in none of {', '.join(SUFFIXES)} (each also .gz); rename the file")
    readers = {".txt": _read_txt, ".json": _read_json, ".jsonl": _read_jsonl, ".parquet": _read_parquet}
    with told_as_text_errors(path):
        yield from readers[kind](path, options)


@contextmanager
def told_as_text_errors(path: Path) -> Iterator[None]:
    """What goes wrong with the file itself inside the block (missing, broken, truncated) becomes a TextError."""
    try:
        yield
    except OSError as error:
        if isinstance(error, gzip.BadGzipFile):
            raise TextError(f"{path}: broken gzip file ({error}); copy it again, or drop .gz") from error
        reason = error.strerror or first_line(error)
        raise TextError(f"{path}: cannot be read ({reason}); check the path and its permissions") from error
    except EOFError as error:
        raise TextError(f"{path}: the gzip file is truncated; copy or download it again") from error
    except zlib.error as error:
        raise TextError(f"{path}: broken gzip file ({error}); copy or download it again") from error


def row_text(row: Any, where: str, options: ReadingOptions) -> str:
    """The text of a row: an object with `options.text_field`, or a string. Raises TextError naming the fields there."""
    if isinstance(row, str):
        return row
    if not isinstance(row, dict):
        raise TextError(f"{where}: a row is an object or a string, and not {type(row).__name__}; convert it")
    if options.text_field not in row:
        fields = ", ".join(map(str, row)) or "none"
        raise TextError(f"{where}: no field {options.text_field!r}; choose with --text-field among: {fields}")
    text = row[options.text_field]
    if not isinstance(text, str):
        raise TextError(
            f"{where}: the field {options.text_field!r} holds {type(text).__name__} and not text; choose another with "
            f"--text-field among: {', '.join(map(str, row))}"
        )
    return text


def _kind(path: Path) -> str | None:
    name = path.name.lower().removesuffix(".gz")
    return next((suffix for suffix in SUFFIXES if name.endswith(suffix)), None)


def open_bytes(path: Path) -> Any:
    """The file in bytes, unpacked where its name ends in .gz."""
    return gzip.open(path, "rb") if path.name.lower().endswith(".gz") else path.open("rb")


def _read_txt(path: Path, options: ReadingOptions) -> Iterator[Piece]:
    if options.separator is None:
        return one_document(_decoded(path))
    return split_documents(_decoded(path), options.separator)


def _decoded(path: Path) -> Iterator[str]:
    # utf-8-sig drops a byte order mark at the start of the file alone.
    decoder, read = codecs.getincrementaldecoder("utf-8-sig")(), 0
    with open_bytes(path) as file:
        while True:
            chunk = file.read(_CHUNK)
            pending = len(decoder.getstate()[0])
            try:
                yield decoder.decode(chunk, final=not chunk)
            except UnicodeDecodeError as error:
                place = read - pending + error.start
                raise TextError(f"{path}: not UTF-8 at byte {place}; save the file as UTF-8") from error
            if not chunk:
                return
            read += len(chunk)


def _read_jsonl(path: Path, options: ReadingOptions) -> Iterator[Piece]:
    with open_bytes(path) as file:
        for number, line in enumerate(file, start=1):
            where = f"{path}: line {number}"
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.strip():
                yield from whole(row_text(parse_json(line, where), where, options))


def _read_json(path: Path, options: ReadingOptions) -> Iterator[Piece]:
    with open_bytes(path) as file:
        content = file.read().removeprefix(codecs.BOM_UTF8)
    parsed = parse_json(content, str(path))
    for number, row in enumerate(parsed if isinstance(parsed, list) else [parsed], start=1):
        yield from whole(row_text(row, f"{path}: row {number}", options))


def parse_json(content: bytes, where: str) -> Any:
    """The content as JSON. Raises TextError with the place for what is none."""
    try:
        return json.loads(content)
    except UnicodeDecodeError as error:
        raise TextError(f"{where}: not UTF-8 at byte {error.start}; save the file as UTF-8") from error
    except json.JSONDecodeError as error:
        place = where if "line" in where.rsplit(":", 1)[-1] else f"{where}: line {error.lineno}"
        raise TextError(f"{place}: not JSON ({error.msg} at column {error.colno}); mend or remove it") from error


def _read_parquet(path: Path, options: ReadingOptions) -> Iterator[Piece]:
    import pyarrow
    import pyarrow.parquet

    field = options.text_field
    with open_bytes(path) as file:
        # Parquet is read from its end: a compressed one is unpacked into memory first.
        source = io.BytesIO(file.read()) if path.name.lower().endswith(".gz") else file
        try:
            table = pyarrow.parquet.ParquetFile(source)
            if field not in table.schema_arrow.names:
                row_text(dict.fromkeys(table.schema_arrow.names), str(path), options)
            number = 0
            for batch in table.iter_batches(batch_size=256, columns=[field]):
                for text in batch.column(0).to_pylist():
                    number += 1
                    yield from whole(row_text({field: text}, f"{path}: row {number}", options))
        except pyarrow.ArrowException as error:
            raise TextError(f"{path}: broken parquet file ({first_line(error)}); copy it again") from error
