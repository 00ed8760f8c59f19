"""A teacher cache on disk, mapped into memory.

A folder of raw arrays, little-endian, whose rows stand in the order of the examples:

  indices.bin  int32 (rows, k)    the entries of the vocabulary with the largest logits, the largest first
  logits.bin   float16 or float32 (rows, k), less the largest of the row
  rest.bin     float32 (rows, 2)  log of the mass outside them, at T and at 1
  offsets.bin  int64 (examples + 1)  where the rows of each example begin
  meta.json    what it was made of, k, T, V, and the error of leaving out the others

Letters: B examples of a batch, N rows, k entries, V vocabulary.
"""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from neural_layers.distill.data.batches import IGNORED_LABEL
from neural_layers.distill.losses import Outputs
from neural_layers.distill.losses.top_k import TopK
from neural_layers.errors import InputError

FORMAT = 1


class TeacherCache:
    """The k largest logits of a teacher for each label of each example.

    meta: what `meta.json` holds; k, temperature, vocabulary: of it
    Raises InputError for a folder that holds no cache, one of another format, or one whose files are not whole.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self.meta = folder, read_meta(folder)
        self.k, self.vocabulary = int(self.meta["k"]), int(self.meta["vocabulary"])
        self.temperature = float(self.meta["temperature"])
        rows, examples = int(self.meta["rows"]), int(self.meta["examples"])
        self._indices = self._map("indices", "<i4", (rows, self.k))
        self._logits = self._map("logits", "<f2" if self.meta["logits"] == "float16" else "<f4", (rows, self.k))
        self._rest = self._map("rest", "<f4", (rows, 2))
        self._offsets = np.array(self._map("offsets", "<i8", (examples + 1,)))

    def __len__(self) -> int:
        """How many examples there are."""
        return len(self._offsets) - 1

    def rows(self, index: Tensor, lengths: Tensor | None = None) -> TopK:
        """The rows of these examples one after another, on the device of `index`.

        index: (B,), the examples' numbers; lengths: (B,), how many of each one's labels count, to be checked.
        Raises ValueError for a number that the cache has not, and for an example with another number of rows.
        """
        numbers = index.cpu().numpy()
        if numbers.size and not (numbers.min() >= 0 and numbers.max() < len(self)):
            raise ValueError(
                f"index goes from {numbers.min()} to {numbers.max()}, and the teacher cache {self.folder} has "
                f"{len(self)} examples; build it from the examples that are trained on"
            )
        starts, counts = self._offsets[numbers], self._offsets[numbers + 1] - self._offsets[numbers]
        if lengths is not None:
            wrong = np.flatnonzero(lengths.cpu().numpy() != counts)
            if wrong.size:
                b = wrong[0]
                raise ValueError(
                    f"example {numbers[b]} has {lengths[b].item()} labels that count, and {counts[b]} rows in the "
                    f"teacher cache {self.folder}; build it from the same examples, tokenizer and lengths"
                )
        rows = np.concatenate([np.arange(s, s + n) for s, n in zip(starts, counts, strict=True)] or [starts])
        indices = torch.from_numpy(self._indices[rows].astype(np.int64))
        logits = torch.from_numpy(self._logits[rows].astype(np.float32))
        rest = torch.from_numpy(self._rest[rows, 0].astype(np.float32))
        return TopK(indices, logits, rest, self.temperature, self.vocabulary).to(index.device)

    def outputs(self, index: Tensor, labels: Tensor) -> Outputs:
        """What stands for the teacher's outputs of a batch with these labels, (B,) or (B, T)."""
        lengths = (labels != IGNORED_LABEL).reshape(len(labels), -1).sum(dim=1)
        return Outputs(cached=self.rows(index, lengths))

    @property
    def summary(self) -> str:
        """One line: what is stored, and the error of leaving out the rest."""
        meta, error = self.meta, self.meta["error"]
        size = sum(path.stat().st_size for path in self.folder.glob("*.bin")) / 1e6
        head = (
            f"teacher cache: the {self.k} largest of {self.vocabulary} logits at T={self.temperature:g}, "
            f"{meta['rows']} rows of {meta['examples']} examples, {size:.1f} MB"
        )
        return (
            f"{head}; outside them {error['outside_mean']:.3%} of the teacher's probability, at most "
            f"{error['outside_max']:.3%}; T²·KL against the {error['against']} on {error['rows']} rows: exact "
            f"{error['exact']:.5g}, cached {error['cached']:.5g} ({error['relative']:+.3%})"
        )

    def _map(self, name: str, dtype: str, shape: tuple[int, ...]) -> np.ndarray:
        path, expected = self.folder / f"{name}.bin", int(np.prod(shape)) * np.dtype(dtype).itemsize
        size = path.stat().st_size if path.is_file() else 0
        if size != expected:
            raise InputError(f"{path} has {size} bytes and should have {expected}; remove the folder and build it anew")
        return np.memmap(path, dtype=dtype, mode="r", shape=shape)


def read_meta(folder: Path) -> dict[str, Any]:
    """What a cache says of itself; raises InputError where there is none, or one of another format."""
    path = folder / "meta.json"
    try:
        meta = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"{folder} holds no teacher cache ({path.name}: {error}); give a new folder, or one that a cache is in"
        ) from error
    if not isinstance(meta, dict) or meta.get("format") != FORMAT:
        found = meta.get("format") if isinstance(meta, dict) else None
        raise InputError(f"{path} has format {found}; this version reads {FORMAT}: build the cache anew")
    return meta
