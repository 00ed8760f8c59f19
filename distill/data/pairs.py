"""Sentence pairs and the files that hold them: `english<TAB>german`, one pair a line, UTF-8, plain or gzip."""

import gzip
import os
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple, NoReturn

from neural_layers.distill.files import replacing
from neural_layers.errors import InputError


class SentencePair(NamedTuple):
    """A source sentence and its translation."""

    source: str
    target: str


class DataError(InputError):
    """Data that cannot be used; the message is one line: the file, the line, the text and the remedy."""


def read_pairs(path: str | os.PathLike[str]) -> list[SentencePair]:
    """The sentence pairs of a file, in order.

    Arguments:
        path: a file of lines `source<TAB>target` in UTF-8, with or without a byte order mark; gzip where the name ends
            in `.gz`. Space around each side is dropped; blank lines may stand at the end.
    Raises:
        DataError: the file is missing, a folder, unreadable, empty, a broken or truncated gzip file or not UTF-8, or a
            line is blank, has not exactly one tab or has an empty side.
    """
    path = Path(path)
    lines = _bytes(path).removeprefix(b"\xef\xbb\xbf").split(b"\n")
    while lines and not lines[-1].strip():
        lines.pop()
    if not lines:
        raise DataError(f"{path}: the file is empty; give one with lines of source<TAB>target")
    return [_pair(path, number, line) for number, line in enumerate(lines, start=1)]


def write_pairs(path: str | os.PathLike[str], pairs: Iterable[tuple[str, str]]) -> None:
    """Write pairs as `read_pairs` reads them, gzip (without a time stamp) where the name ends in `.gz`.

    The file is written beside its place and renamed, so that an interrupted call leaves what was there.

    Raises:
        DataError: no pairs, or a side that a line cannot hold: empty, with space around it, a tab or a line break.
        OSError: the folder is missing or the disk is full.
    """
    path, lines = Path(path), []
    for number, (source, target) in enumerate(pairs, start=1):
        for side in (source, target):
            if not side or side != side.strip() or set(side) & set("\t\r\n"):
                _refuse(
                    path,
                    number,
                    side,
                    "a side that a line cannot hold",
                    "it needs text without tab, line break or outer space",
                )
        lines.append(f"{source}\t{target}\n")
    if not lines:
        raise DataError(f"{path}: no pairs to write; give at least one")
    data = "".join(lines).encode("utf-8")
    with replacing(path) as beside:
        beside.write_bytes(gzip.compress(data, mtime=0) if path.suffix == ".gz" else data)


def _bytes(path: Path) -> bytes:
    if path.is_dir():
        raise DataError(f"{path}: is a folder; give one of the files in it")
    if not path.exists():
        raise DataError(f"{path}: no such file; check the path (seen from {Path.cwd()})")
    try:
        data = path.read_bytes()
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
    if path.suffix != ".gz":
        return data
    try:
        return gzip.decompress(data)
    except EOFError as error:
        raise DataError(f"{path}: the gzip file is truncated; copy or download it again") from error
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(
            f"{path}: broken gzip file ({error}); copy it again, or drop .gz if it is plain text"
        ) from error


def _pair(path: Path, number: int, line: bytes) -> SentencePair:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError as error:
        where = f"not UTF-8 (byte 0x{line[error.start]:02x} at position {error.start + 1})"
        _refuse(path, number, line.decode("utf-8", "replace"), where, "save the file as UTF-8")
    sides = text.split("\t")
    if not text.strip():
        _refuse(path, number, text, "blank line", "remove it; blank lines may stand at the end only")
    if len(sides) != 2:
        _refuse(path, number, text, f"{len(sides) - 1} tabs instead of one", "write source<TAB>target")
    source, target = (side.strip() for side in sides)
    if not source or not target:
        side = "target" if source else "source"
        _refuse(path, number, text, f"the {side} is empty", "fill it in or remove the line")
    return SentencePair(source, target)


def _refuse(path: Path, number: int, text: str, problem: str, remedy: str) -> NoReturn:
    shown = text.strip("\r\n")
    shown = shown if len(shown) <= 60 else shown[:57] + "..."
    raise DataError(f"{path}, line {number}: {problem}: {shown!r}; {remedy}") from None
