"""Where text comes from: `--data SOURCE[=WEIGHT]`, resolved to files or to a Hugging Face dataset."""

import glob
import hashlib
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from neural_layers.distill.text.datasets_hub import HubPart, hub_part, is_saved_dataset
from neural_layers.distill.text.errors import TextError
from neural_layers.distill.text.pieces import Piece
from neural_layers.distill.text.reading import SUFFIXES, ReadingOptions, is_readable, read_file
from neural_layers.errors import InputError

_SPLITS = {"train": ("train",), "valid": ("valid", "val", "dev"), "test": ("test",)}


class Part(Protocol):
    """A part of a source that is read from its beginning: a file, or a Hugging Face dataset."""

    @property
    def name(self) -> str:
        """What messages call it."""

    def read(self, options: ReadingOptions, streaming: bool = False) -> Iterator[Piece]:
        """Its documents in pieces, the same at every call. Raises TextError."""

    def digest(self) -> str:
        """A hash of its content, by which a cache of its tokens is found. Raises TextError where it cannot be read."""


@dataclass(frozen=True)
class FilePart:
    """One file of a source."""

    path: Path

    @property
    def name(self) -> str:
        return str(self.path)

    def read(self, options: ReadingOptions, streaming: bool = False) -> Iterator[Piece]:
        return read_file(self.path, options)

    def digest(self) -> str:
        """The SHA-256 of the file's bytes and its kind."""
        digest = hashlib.sha256("".join(self.path.suffixes[-2:]).lower().encode())
        try:
            with self.path.open("rb") as file:
                while chunk := file.read(1 << 20):
                    digest.update(chunk)
        except OSError as error:
            raise TextError(f"{self.path}: cannot be read ({error.strerror}); check its permissions") from error
        return digest.hexdigest()


@dataclass(frozen=True)
class Source:
    """A named source with its parts in order and its share of the training sequences (relative to the other sources).

    valid: the parts of a folder that its file names reserve for validation, empty where there are none
    """

    name: str
    weight: float
    parts: tuple[Part, ...]
    valid: tuple[Part, ...] = ()


def parse_sources(specs: Sequence[str]) -> list[Source]:
    """The sources that `--data` options name, each as `SOURCE` or `SOURCE=WEIGHT`.

    SOURCE is a file (`.txt`, `.json`, `.jsonl`, `.parquet`, each also `.gz`), a folder (all such files in it and below,
    in the order of their names; where names begin with train, valid (or val, dev) and test, those of train, and the
    valid ones are told apart), a pattern (`corpus/**/*.txt`), a folder that `save_to_disk` of `datasets` wrote, or
    `hf:NAME[:CONFIG[:SPLIT]]` for a dataset of the Hugging Face hub or a local dataset folder.
    Raises: InputError for a source that does not exist or holds no such files, and for weights that are not positive
    finite numbers.
    """
    if not specs:
        raise InputError("no data; give --data with a file, a folder, a pattern or hf:NAME")
    return [_source(*_weight(spec)) for spec in specs]


def _weight(spec: str) -> tuple[str, float]:
    name, equals, number = spec.rpartition("=")
    if not equals or Path(spec).exists():
        return spec, 1.0
    try:
        weight = float(number)
    except ValueError as error:
        raise InputError(
            f"{spec}: {number!r} is no weight and no such file exists; write SOURCE=WEIGHT with a number, as in "
            f"{name}=0.5"
        ) from error
    if not math.isfinite(weight) or weight <= 0:
        raise InputError(f"{name}: weight {number} must be a positive number; leave the source out instead of 0")
    if not name:
        raise InputError(f"{spec}: a weight without a source; write SOURCE=WEIGHT")
    return name, weight


def _source(name: str, weight: float) -> Source:
    if name.startswith("hf:"):
        return Source(name, weight, (hub_part(name),))
    path = Path(name).expanduser()
    if path.is_file():
        if not is_readable(path):
            raise InputError(f"{name}: the name ends in none of {', '.join(SUFFIXES)} (each also .gz); rename the file")
        return Source(name, weight, (FilePart(path),))
    if path.is_dir():
        return _folder(name, path, weight)
    if glob.has_magic(name):
        found = sorted(Path(p) for p in glob.glob(str(path), recursive=True))
        files = [p for p in found if p.is_file() and is_readable(p)]
        if not files:
            raise InputError(f"{name}: the pattern matches no file that ends in {', '.join(SUFFIXES)} (each also .gz)")
        return Source(name, weight, tuple(map(FilePart, files)))
    raise InputError(f"{name}: no such file or folder; a dataset of the Hugging Face hub is written hf:{name}")


def _folder(name: str, path: Path, weight: float) -> Source:
    if is_saved_dataset(path):
        return Source(name, weight, (HubPart(str(path), None, "train"),))
    files = sorted(p for p in path.rglob("*") if p.is_file() and is_readable(p) and not _is_hidden(p, path))
    if not files:
        raise InputError(f"{name}: the folder holds no file that ends in {', '.join(SUFFIXES)} (each also .gz)")
    splits = {split: [p for p in files if p.name.lower().startswith(starts)] for split, starts in _SPLITS.items()}
    if splits["train"] and (splits["valid"] or splits["test"]):
        return Source(name, weight, _parts(splits["train"]), _parts(splits["valid"]))
    return Source(name, weight, _parts(files))


def _parts(files: Sequence[Path]) -> tuple[Part, ...]:
    return tuple(map(FilePart, files))


def _is_hidden(path: Path, below: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(below).parts)
