"""Documents in pieces, so that no document has to fit into memory."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

PIECE_CHARACTERS = 1 << 18


class Piece(NamedTuple):
    """A part of a document: its text, and whether the document begins and ends with it."""

    text: str
    begins: bool = True
    ends: bool = True


def whole(text: str) -> Iterator[Piece]:
    """One document that is in memory already, in pieces of at most about `PIECE_CHARACTERS`."""
    yield from one_document([text])


def one_document(parts: Iterable[str]) -> Iterator[Piece]:
    """The pieces of one document given in parts of any size; none for an empty document.

    A piece ends where white space follows a character that is none: byte-level and character tokenizers have a border
    there anyway, so that the tokens of the pieces are the tokens of the document. A stretch of a quarter of a million
    characters without such a place is cut where it is.
    """
    buffer, begins = "", True
    for part in parts:
        buffer += part
        # Twice the size, so that what remains after a cut is never empty: the last piece is told as the last.
        while len(buffer) >= 2 * PIECE_CHARACTERS:
            cut = _border(buffer)
            yield Piece(buffer[:cut], begins, False)
            buffer, begins = buffer[cut:], False
    if buffer:
        yield Piece(buffer, begins, True)


def _border(text: str) -> int:
    for cut in range(PIECE_CHARACTERS, 0, -1):
        if text[cut].isspace() and not text[cut - 1].isspace():
            return cut
    return PIECE_CHARACTERS


def split_documents(parts: Iterable[str], separator: str) -> Iterator[Piece]:
    """The pieces of the documents that `separator` divides a text into, which is given in parts of any size.

    The separator belongs to no document, and what is empty or white space between two separators is no document.
    """
    buffer, begins = "", True
    for part in parts:
        buffer += part
        while (end := buffer.find(separator)) >= 0:
            yield from _rest_of_document(buffer[:end], begins)
            buffer, begins = buffer[end + len(separator) :], True
        while len(buffer) >= 2 * PIECE_CHARACTERS + len(separator):
            cut = _border(buffer)
            if begins and not buffer[:cut].strip():
                buffer = buffer[cut:]  # white space alone begins no document
                continue
            yield Piece(buffer[:cut], begins, False)
            buffer, begins = buffer[cut:], False
    yield from _rest_of_document(buffer, begins)


def _rest_of_document(text: str, begins: bool) -> Iterator[Piece]:
    if begins and not text.strip():
        return
    for piece in one_document([text]) if text else [Piece("")]:
        yield Piece(piece.text, begins and piece.begins, piece.ends)
