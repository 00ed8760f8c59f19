"""Text in and out of an exported model: its tokenizer, and pieces of text as tokens come."""

from pathlib import Path
from typing import Any

from neural_layers.errors import InputError, require

_BROKEN = "\ufffd"  # what a token ends in that is only the first bytes of a character


def load_tokenizer(folder: Path) -> Any:
    """The `tokenizers.Tokenizer` of a folder; raises InputError where there is none that can be read."""
    path = folder / "tokenizer.json"
    if not path.is_file():
        raise InputError(
            f"there is no tokenizer.json in {folder}, so text cannot be read or written; give token ids, or "
            "export with tokenizer=…"
        )
    require("tokenizers", extra="onnx")
    from tokenizers import Tokenizer

    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # what a broken file raises is a bare Exception
        raise InputError(f"{path} cannot be read: {error}; export the model again") from error


class TextPieces:
    """The text of one row, a token at a time.

    A piece is given out when its characters are whole and no stop string can begin in it any more. `stopped` turns true
    at a stop string, which is not part of the text.
    """

    def __init__(self, tokenizer: Any, stops: list[str]) -> None:
        self.tokenizer, self.stops, self.stopped = tokenizer, stops, False
        self._ids: list[int] = []
        # Text is decoded from `_begin` on: a token's text may depend on the one before it, and on no earlier one.
        self._begin, self._read, self._held = 0, 0, ""
        self._ready: list[str] = []

    def push(self, token: int) -> None:
        """Read the next token."""
        self._ids.append(token)
        known = self._decode(self._ids[self._begin : self._read])
        text = self._decode(self._ids[self._begin :])
        if len(text) > len(known) and not text.endswith(_BROKEN):
            self._begin, self._read = self._read, len(self._ids)
            self._give(text[len(known) :])

    def end(self) -> None:
        """No token follows: what was held back is text after all."""
        if not self.stopped:
            known = self._decode(self._ids[self._begin : self._read])
            self._give(self._decode(self._ids[self._begin :])[len(known) :])
            if not self.stopped:
                self._ready.append(self._held)
        self._held = ""

    def take(self) -> str:
        """The text that has become ready since the last call."""
        piece = "".join(self._ready)
        self._ready.clear()
        return piece

    def _decode(self, ids: list[int]) -> str:
        text: str = self.tokenizer.decode(ids, skip_special_tokens=True)
        return text

    def _give(self, text: str) -> None:
        text = self._held + text
        found = [at for stop in self.stops if stop and (at := text.find(stop)) >= 0]
        if found:
            self.stopped, self._held = True, ""
            self._ready.append(text[: min(found)])
            return
        held = max((_overlap(text, stop) for stop in self.stops), default=0)
        self._held = text[len(text) - held :]
        self._ready.append(text[: len(text) - held])


def _overlap(text: str, stop: str) -> int:
    """How many of the last characters of `text` begin `stop`."""
    return next((n for n in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:n])), 0)
