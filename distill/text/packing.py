"""Full training sequences of documents, with exact borders."""

from dataclasses import dataclass

import numpy as np

IGNORED = -100


@dataclass(frozen=True)
class Packed:
    """A sequence of T tokens out of one or several documents; all arrays are (T,) int64.

    input_ids:    the tokens
    labels:       the tokens, −100 at the first of each run, which nothing in the sequence predicts
    seq_idx:      the number of the run that a token belongs to, from 0; a run is a stretch of one document
    position_ids: from 0 in every run
    """

    input_ids: np.ndarray
    labels: np.ndarray
    seq_idx: np.ndarray
    position_ids: np.ndarray


def pack(tokens: np.ndarray, run_starts: np.ndarray) -> Packed:
    """The sequence of `tokens`, whose runs begin at `run_starts` and at 0.

    A document that was longer than what fits continues as a new run in another sequence.
    """
    ids = np.asarray(tokens, dtype=np.int64)
    is_start = np.zeros(len(ids), dtype=bool)
    is_start[np.asarray(run_starts, dtype=np.int64)] = True
    is_start[:1] = True
    seq_idx = np.cumsum(is_start) - 1
    position_ids = np.arange(len(ids)) - np.flatnonzero(is_start)[seq_idx]
    return Packed(ids, np.where(is_start, IGNORED, ids), seq_idx, position_ids)


def window(tokens: np.ndarray, starts: np.ndarray, begin: int, length: int) -> Packed:
    """The sequence of `length` tokens that begins at `begin` in the documents one after another.

    tokens, starts: as in `TokenStore`. Past the last token it goes on with the first, as a new run; `length` is at most
    the number of tokens.
    """
    count = len(tokens)
    end = begin + length
    pieces = [(begin, min(end, count))] + ([(0, end - count)] if end > count else [])
    runs, taken, offset = [], [], 0
    for low, high in pieces:
        first, last = np.searchsorted(starts, [low, high])
        runs += [np.array([offset]), starts[first:last] - low + offset]
        taken.append(tokens[low:high])
        offset += high - low
    return pack(np.concatenate(taken), np.concatenate(runs))
