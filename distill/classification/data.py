"""Labelled texts: one dataset or several, with their classes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neural_layers.distill.classification.labels import LabelMap, classes_of, read_names, read_renames
from neural_layers.distill.classification.rows import Row, read_rows, suffix
from neural_layers.distill.text.errors import TextError
from neural_layers.errors import InputError

SPLITS = {"train": ("train",), "valid": ("valid", "val", "dev"), "test": ("test",)}


@dataclass(frozen=True)
class LabelledTexts:
    """Texts with the numbers of their classes, and the dataset that each comes from."""

    texts: tuple[str, ...]
    labels: tuple[int, ...]
    sources: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True)
class ClassificationData:
    """The splits of a run and the names of its classes, by number."""

    classes: tuple[str, ...]
    train: LabelledTexts
    valid: LabelledTexts
    test: LabelledTexts


@dataclass(frozen=True)
class Fields:
    """The fields of a row that hold the text and the label."""

    text: str = "text"
    label: str = "label"


def load_labelled(
    data: Sequence[str],
    valid: Sequence[str] = (),
    test: Sequence[str] = (),
    *,
    labels: Path | None = None,
    label_maps: Sequence[str] = (),
    fields: Fields | None = None,
) -> ClassificationData:
    """Read the datasets that `[NAME=]PATH` name.

    data:       a file, or a folder with files whose names begin with train, valid (or val, dev) and test, of which the
                folder's validation and test are taken too; labels.json beside the data says what numbers stand for
    valid, test: files, instead of those of the folders
    labels:     a JSON file with the run's classes, which then are all that there are
    label_maps: `NAME=FILE`, JSON objects of the run's class by the dataset's
    fields:     where text and label stand in a row
    Raises: InputError for what cannot be read, labels outside the map, rows without the fields, a split that is empty
    (validation and test too), and a class that has no training example; each names the place and the remedy.
    """
    named = [_split_name(spec, i, len(data)) for i, spec in enumerate(data)]
    names = [name for name, _ in named]
    if len(set(names)) != len(names):
        raise InputError(
            f"two datasets are called {max(names, key=names.count)}; write --data NAME=PATH with two names"
        )
    chosen = None if labels is None else read_names(labels)
    renames = _renames(label_maps, names)
    maps = {name: LabelMap(_own_names(path, chosen), renames.get(name)) for name, path in named}
    train_files = [(name, _file(path, "train")) for name, path in named]
    others = {
        "valid": _others(valid, named, "valid"),
        "test": _others(test, named, "test"),
    }
    fields = fields or Fields()
    read = {"train": _read(train_files, maps, fields), **{k: _read(v, maps, fields) for k, v in others.items()}}
    classes = classes_of([name for _, _, name, _ in read["train"]], list(maps.values()), chosen)
    splits = {split: _numbered(rows, classes) for split, rows in read.items()}
    for split, texts in splits.items():
        if not len(texts):
            option = "--data" if split == "train" else f"--{split}"
            raise InputError(f"the {split} data is empty; give texts with {option}")
    missing = sorted(set(range(len(classes))) - set(splits["train"].labels))
    if missing:
        raise InputError(
            f"class {classes[missing[0]]!r} has no training example; add some, or leave it out of the labels"
            + (f" (as {len(missing) - 1} more)" if len(missing) > 1 else "")
        )
    return ClassificationData(classes, **splits)


def read_texts(path: Path, classes: Sequence[str], fields: Fields) -> LabelledTexts:
    """The labelled texts of one file, or of the test file of a folder, whose labels are of these classes.

    Raises InputError as `load_labelled`, and for a file without texts.
    """
    names = tuple(classes)
    rows = _read([("data", _file(path, "test"))], {"data": LabelMap(_own_names(path, names), None)}, fields)
    if not rows:
        raise InputError(f"{path} holds no labelled texts; give at least one")
    return _numbered(rows, names)


_Named = tuple[str, str, str, Row]  # dataset, text, class, row


def _split_name(spec: str, index: int, count: int) -> tuple[str, Path]:
    name, equals, path = spec.partition("=")
    if equals and name and not Path(spec).exists():
        return name, Path(path)
    own = Path(spec).name.split(".")[0] if count > 1 else "data"
    return own or f"data{index + 1}", Path(spec)


def _renames(label_maps: Sequence[str], names: list[str]) -> dict[str, dict[str, str | None]]:
    found = {}
    for spec in label_maps:
        name, equals, path = spec.partition("=")
        if not equals:
            name, path = "data", spec
        if name not in names:
            raise InputError(f"--label-map {spec}: there is no dataset {name!r}; there are {', '.join(names)}")
        found[name] = read_renames(Path(path))
    return found


def _own_names(path: Path, chosen: tuple[str, ...] | None) -> tuple[str, ...] | None:
    """What numbers stand for in the dataset: its own labels.json, else the run's classes."""
    beside = (path if path.is_dir() else path.parent) / "labels.json"
    return read_names(beside) if beside.is_file() else chosen


def _others(specs: Sequence[str], named: list[tuple[str, Path]], split: str) -> list[tuple[str, Path]]:
    """The files of a split: those given, else those of the folders."""
    if not specs:
        return [(name, _file(path, split)) for name, path in named if path.is_dir()]
    names = [name for name, _ in named]
    found = []
    for spec in specs:
        name, equals, path = spec.partition("=")
        if not equals or name not in names:
            if len(names) > 1:
                raise InputError(f"--{split} {spec}: say whose it is, NAME=FILE with one of {', '.join(names)}")
            name, path = names[0], spec
        found.append((name, Path(path)))
    return found


def _file(path: Path, split: str) -> Path:
    if not path.is_dir():
        return path
    files = sorted(p for p in path.iterdir() if p.is_file() and suffix(p) and p.name.lower().startswith(SPLITS[split]))
    if len(files) != 1:
        found = ", ".join(p.name for p in files) or "none"
        raise InputError(
            f"{path}: needs one file whose name begins with {split}, and has {found}; name the file itself"
        )
    return files[0]


def _read(files: list[tuple[str, Path]], maps: dict[str, LabelMap], fields: Fields) -> list[_Named]:
    rows = []
    for dataset, path in files:
        for row in read_rows(path):
            text = _field(row, fields.text, "--text-field")
            if not isinstance(text, str) or not text.strip():
                raise TextError(f"{row.where}: the field {fields.text!r} holds no text ({text!r}); mend or remove it")
            name = maps[dataset].name(_field(row, fields.label, "--label-field"), row.where)
            if name is not None:
                rows.append((dataset, text, name, row))
    return rows


def _field(row: Row, name: str, option: str) -> Any:
    if name not in row.fields:
        known = ", ".join(map(str, row.fields)) or "none"
        raise TextError(f"{row.where}: no field {name!r}; choose with {option} among: {known}")
    return row.fields[name]


def _numbered(rows: list[_Named], classes: tuple[str, ...]) -> LabelledTexts:
    numbers = {name: number for number, name in enumerate(classes)}
    for _, _, name, row in rows:
        if name not in numbers:
            raise TextError(f"{row.where}: label {name!r} is outside the labels {', '.join(classes)}; map or add it")
    return LabelledTexts(
        tuple(text for _, text, _, _ in rows),
        tuple(numbers[name] for _, _, name, _ in rows),
        tuple(dataset for dataset, _, _, _ in rows),
    )
