"""A source as tokens on disk: written once, found again by its content, mapped into memory."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from neural_layers.distill.files import replacing, save_json
from neural_layers.distill.text.errors import TextError
from neural_layers.distill.text.pieces import Piece
from neural_layers.distill.text.reading import ReadingOptions
from neural_layers.distill.text.sources import Part
from neural_layers.distill.text.tokenizing import fingerprint, token_ids

_VERSION = 1
_BATCH = 256


@dataclass(frozen=True)
class TokenStore:
    """The documents of a source one after another as token ids, in memory or mapped from a file.

    tokens: (N,) ids, each document ended by the tokenizer's end token where it has one
    starts: (documents,) where each document begins, from 0
    text_bytes: the length of all documents' text in UTF-8
    key:    what the content and the tokenizer hash to, empty for a store in memory
    reused: whether it was found in the cache
    """

    tokens: np.ndarray
    starts: np.ndarray
    text_bytes: int
    key: str = ""
    reused: bool = False

    def __len__(self) -> int:
        return len(self.tokens)

    def count(self, token: int | None) -> int:
        """How often a token occurs; 0 for None."""
        return 0 if token is None else int(np.count_nonzero(self.tokens == token))


def default_cache() -> Path:
    """`$XDG_CACHE_HOME/neural_layers/tokens`, by default below `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "neural_layers" / "tokens"


def tokens_of(pieces: Iterator[Piece], tokenizer: Any) -> Iterator[tuple[Piece, list[int]]]:
    """Each piece with its ids, the end token included where a document ends."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    while batch := _batch(pieces):
        for piece, ids in zip(batch, token_ids(tokenizer, [piece.text for piece in batch]), strict=True):
            yield piece, ids + end if piece.ends else ids


def _batch(pieces: Iterator[Piece]) -> list[Piece]:
    batch: list[Piece] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece.text)
        if len(batch) >= _BATCH or size >= 1 << 20:
            break
    return batch


def store_key(parts: Sequence[Part], tokenizer: Any, options: ReadingOptions) -> str:
    """The hash by which the tokens of these parts are found again. Raises TextError for parts that cannot be read."""
    content = {
        "version": _VERSION,
        "parts": [part.digest() for part in parts],
        "tokenizer": fingerprint(tokenizer),
        "text_field": options.text_field,
        "separator": options.separator,
    }
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def open_store(
    parts: Sequence[Part],
    tokenizer: Any,
    options: ReadingOptions,
    cache: Path,
    tell: Callable[[int], None] = lambda characters: None,
) -> TokenStore:
    """The tokens of the parts, from `cache` where they are there, else written to it first.

    The folder in the cache appears whole or not at all, and holds no pickles: raw ids, raw starts, `meta.json`.
    tell: is called with the number of characters read so far
    Raises: TextError where a part cannot be read or all of them are empty; OSError where the cache cannot be written.
    """
    key = store_key(parts, tokenizer, options)
    folder = cache / key
    if (store := _mapped(folder, key)) is not None:
        return store
    cache.mkdir(parents=True, exist_ok=True)
    if folder.exists():
        shutil.rmtree(folder)  # damaged: a whole one was taken above
    dtype = np.dtype("<u2" if max(tokenizer.get_vocab().values()) < 1 << 16 else "<u4")
    try:
        with replacing(folder) as beside:
            beside.mkdir()
            _write(beside, parts, tokenizer, options, dtype, tell)
    except OSError:
        # Another process may have written the same folder meanwhile.
        if _mapped(folder, key) is None:
            raise
    store = _mapped(folder, key)
    if store is None:
        raise OSError(f"{folder} cannot be read after it was written; remove it, or give another --cache")
    return TokenStore(store.tokens, store.starts, store.text_bytes, key, reused=False)


def _write(
    folder: Path,
    parts: Sequence[Part],
    tokenizer: Any,
    options: ReadingOptions,
    dtype: np.dtype,
    tell: Callable[[int], None],
) -> None:
    count = documents = characters = text_bytes = 0
    with (folder / "tokens.bin").open("wb") as tokens, (folder / "starts.bin").open("wb") as starts:
        for part in parts:
            for piece, ids in tokens_of(part.read(options), tokenizer):
                if piece.begins:
                    starts.write(np.array([count], dtype="<i8").tobytes())
                    documents += 1
                tokens.write(np.array(ids, dtype=dtype).tobytes())
                count += len(ids)
                characters += len(piece.text)
                text_bytes += len(piece.text.encode())
                tell(characters)
    if not text_bytes:
        raise TextError(f"{', '.join(part.name for part in parts[:3])}: no text in it; give data that is not empty")
    meta = {"dtype": dtype.str, "tokens": count, "documents": documents, "text_bytes": text_bytes}
    save_json(folder / "meta.json", meta)


def _mapped(folder: Path, key: str) -> TokenStore | None:
    """The store in `folder`, or None where there is none or it is damaged."""
    try:
        meta = json.loads((folder / "meta.json").read_text())
        dtype, count, documents = np.dtype(meta["dtype"]), meta["tokens"], meta["documents"]
        sizes = (folder / "tokens.bin").stat().st_size, (folder / "starts.bin").stat().st_size
    except (OSError, ValueError, KeyError, TypeError):
        return None
    if sizes != (count * dtype.itemsize, documents * 8):
        return None
    tokens = np.memmap(folder / "tokens.bin", dtype=dtype, mode="r")
    starts = np.fromfile(folder / "starts.bin", dtype="<i8")
    return TokenStore(tokens, starts, meta["text_bytes"], key, reused=True)
