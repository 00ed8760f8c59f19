"""Text from tokens as they come, never half a character."""

from collections.abc import Sequence
from typing import Any

_UNKNOWN = "\N{REPLACEMENT CHARACTER}"  # what decoding puts for bytes that are no character (yet)
_MOST = 3  # so many bytes may wait for the one that completes a character


class TextPieces:
    """Decodes tokens one by one: `push(ids)` returns the text that they complete, `finish()` what was held back.

    All pieces together are `tokenizer.decode` of all tokens. A character of several bytes is given out when its last
    byte has come, in whatever way the bytes are spread over tokens; bytes that can no longer become a character, as the
    replacement character that decoding puts for them. `text` is everything given out so far.

    Only a window of the last tokens is decoded at each step.
    """

    def __init__(self, tokenizer: Any, skip_special_tokens: bool = True) -> None:
        self.tokenizer, self.skip_special_tokens = tokenizer, skip_special_tokens
        self.text = ""
        self._ids: list[int] = []
        self._start = 0  # of the window
        self._complete = 0  # tokens up to here end with a whole character
        self._given = ""  # the window's text that was given out

    def push(self, ids: Sequence[int]) -> str:
        """The text that these tokens complete; empty where they complete none."""
        self._ids += ids
        window = self._decode(self._start)
        tail = len(window) - len(window.rstrip(_UNKNOWN))
        stable = window[: len(window) - min(tail, _MOST)]
        if not stable.startswith(self._given):
            return ""
        piece = stable[len(self._given) :]
        self._given = stable
        if not tail and piece:
            # The window moves on, and keeps the tokens before as context: some decoders look at what stands before.
            self._start, self._complete = self._complete, len(self._ids)
            self._given = self._decode(self._start)
        self.text += piece
        return piece

    def finish(self) -> str:
        """The text that was held back: the rest of what decoding all tokens gives."""
        whole = self._decode(0)
        rest = whole[len(self.text) :] if whole.startswith(self.text) else ""
        self.text += rest
        return rest

    def _decode(self, start: int) -> str:
        return self.tokenizer.decode(
            self._ids[start:], skip_special_tokens=self.skip_special_tokens, clean_up_tokenization_spaces=False
        )
