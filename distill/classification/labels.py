"""Labels as they stand in files, and the classes of a run."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neural_layers.distill.text.errors import TextError, first_line
from neural_layers.errors import InputError


@dataclass(frozen=True)
class LabelMap:
    """How the labels of one dataset become names.

    names:   what the numbers 0, 1, … stand for in this dataset; None where its labels are names themselves
    renamed: other names for some of them, where several datasets share classes; None as a name leaves the rows out
    """

    names: tuple[str, ...] | None = None
    renamed: dict[str, str | None] | None = None

    def name(self, label: Any, where: str) -> str | None:
        """The class that `label` names: a number or a name, as text or as JSON. None where its rows are left out.

        Raises: TextError with the place for a label that is no number of `names` and none of them, or no label at all.
        """
        if isinstance(label, bool) or not isinstance(label, (int, str)) or label == "":
            raise TextError(f"{where}: the label is {label!r}; a label is a whole number or a name")
        name = str(label).strip()
        if self.names is not None and name not in self.names:
            if not (name.isascii() and name.isdigit()) or int(name) >= len(self.names):
                known = f"0 to {len(self.names) - 1} or one of: {', '.join(self.names)}"
                raise TextError(f"{where}: label {label!r} is outside the label map; it has {known}")
            name = self.names[int(name)]
        return (self.renamed or {}).get(name, name)


def read_names(path: Path) -> tuple[str, ...]:
    """The names of classes in a JSON file: a list in the order of their numbers, or an object of names by number.

    Raises: InputError where it is neither, or names fewer than two classes or one of them twice.
    """
    content = _json(path)
    if isinstance(content, dict):
        numbers = [str(i) for i in range(len(content))]
        if sorted(content) != sorted(numbers):
            raise InputError(f"{path}: labels by number need 0 to {len(content) - 1}, each once; number them so")
        content = [content[number] for number in numbers]
    if not isinstance(content, list) or not all(isinstance(name, str) and name.strip() for name in content):
        raise InputError(f"{path}: labels are a list of names, or an object of names by number; write one of them")
    if len(set(content)) != len(content) or len(content) < 2:
        raise InputError(f"{path}: {len(content)} labels, {len(set(content))} of them distinct; give two or more, once")
    return tuple(name.strip() for name in content)


def read_renames(path: Path) -> dict[str, str | None]:
    """A label map of one dataset: a JSON object of the run's class by the dataset's, null for what is left out.

    Raises: InputError where it is none.
    """
    content = _json(path)
    if not isinstance(content, dict) or not all(value is None or isinstance(value, str) for value in content.values()):
        raise InputError(f'{path}: a label map is a JSON object such as {{"old": "new", "unwanted": null}}')
    return content


def classes_of(found: Sequence[str], maps: Sequence[LabelMap], chosen: tuple[str, ...] | None) -> tuple[str, ...]:
    """The classes of a run: those chosen, else those of the label maps in their order, else the names found, sorted.

    found: the names in the training data. Names that are all numbers are sorted as numbers.
    Raises: InputError where there are fewer than two.
    """
    if chosen is not None:
        return chosen
    listed = [m.name(name, "labels") for m in maps for name in m.names or ()]
    classes = tuple(dict.fromkeys(name for name in listed if name is not None))
    rest = set(found) - set(classes)
    classes += tuple(sorted(rest, key=lambda name: (int(name) if name.isdecimal() else -1, name)))
    if len(classes) < 2:
        raise InputError(
            f"the data has {len(classes)} class(es) ({', '.join(classes)}); a classifier needs two or more"
        )
    return classes


def _json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}); check the path") from error
    except ValueError as error:
        raise InputError(f"{path}: not JSON ({first_line(error)}); mend it") from error
