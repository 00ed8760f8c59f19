"""Documents from the `datasets` library: the Hugging Face hub, local dataset folders and `save_to_disk`."""

import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from neural_layers.distill.text.errors import TextError, first_line
from neural_layers.distill.text.pieces import Piece, whole
from neural_layers.distill.text.reading import ReadingOptions, row_text
from neural_layers.errors import InputError, require


@dataclass(frozen=True)
class HubPart:
    """A split of a dataset; `path` is a name on the hub or a local folder."""

    path: str
    config: str | None
    split: str

    @property
    def name(self) -> str:
        return ":".join(("hf", self.path, self.config or "", self.split))

    def read(self, options: ReadingOptions, streaming: bool = False) -> Iterator[Piece]:
        """Each row of the split as a document. `streaming` reads a hub dataset without a local copy."""
        for number, row in enumerate(self._load(streaming), start=1):
            yield from whole(row_text(row, f"{self.name}: row {number}", options))

    def digest(self) -> str:
        """The SHA-256 of the files of a local folder, else `datasets`' own fingerprint of the split's content."""
        if not Path(self.path).is_dir():
            return f"{self.config}:{self.split}:{self._load(streaming=False)._fingerprint}"
        digest = hashlib.sha256(f"{self.config}:{self.split}".encode())
        for path in sorted(p for p in Path(self.path).rglob("*") if p.is_file()):
            digest.update(str(path.relative_to(self.path)).encode())
            with path.open("rb") as file:
                while chunk := file.read(1 << 20):
                    digest.update(chunk)
        return digest.hexdigest()

    def _load(self, streaming: bool) -> Any:
        require("datasets", extra="train")
        import datasets

        # What is raised differs with what is wrong (network, files, names); whatever it is, there is no data.
        try:
            if is_saved_dataset(Path(self.path)):
                loaded = datasets.load_from_disk(self.path)
            else:
                loaded = datasets.load_dataset(self.path, self.config, streaming=streaming)
        except Exception as error:
            raise TextError(
                f"{self.name}: the dataset cannot be loaded ({first_line(error)}); check the name, the configuration "
                "and the connection"
            ) from error
        if not isinstance(loaded, (datasets.DatasetDict, datasets.IterableDatasetDict)):
            return loaded
        if self.split not in loaded:
            raise TextError(f"{self.name}: no split {self.split!r}; choose among: {', '.join(map(str, loaded))}")
        return loaded[self.split]


def hub_part(spec: str) -> HubPart:
    """The dataset that `hf:NAME[:CONFIG[:SPLIT]]` names; the split is train where none is given. Raises InputError."""
    name, *rest = spec.removeprefix("hf:").split(":")
    if not name or len(rest) > 2:
        raise InputError(f"{spec}: write hf:NAME, hf:NAME:CONFIG or hf:NAME:CONFIG:SPLIT (hf:NAME::SPLIT)")
    config, split, *_ = itertools.chain(rest, ("", "")[len(rest) :])
    return HubPart(name, config or None, split or "train")


def is_saved_dataset(path: Path) -> bool:
    """Whether `save_to_disk` of `datasets` wrote this folder."""
    return (path / "dataset_dict.json").is_file() or (
        (path / "state.json").is_file() and (path / "dataset_info.json").is_file()
    )
