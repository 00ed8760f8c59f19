"""The loop of decoding, and the checks of what is given to it.

Letters: B batch, T tokens, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from neural_layers.errors import InputError
from neural_layers.models.export.sampling import GenerationOptions, choose
from neural_layers.models.export.text import TextPieces


def decode(
    step: Callable[[np.ndarray], np.ndarray],
    logits_BV: np.ndarray,
    ids_BT: np.ndarray,
    options: GenerationOptions,
    budget: int,
    texts: Sequence[TextPieces] = (),
) -> Iterator[np.ndarray]:
    """The tokens (B,) that follow `ids`, until every row has ended or `budget` are made.

    step: reads tokens (B, 1) and returns the logits (B, V) after them. logits: those after `ids`. texts: one for each
    row, which reads the row's tokens; a row ends at its stop string.
    """
    random = np.random.default_rng(options.seed)
    ended_B = np.zeros(len(ids_BT), bool)
    for made in range(budget):
        chosen_B = np.where(ended_B, options.padding, choose(logits_BV, ids_BT, made, options, random))
        is_end_B = np.isin(chosen_B, options.ends)
        for row, text in enumerate(texts):
            if not ended_B[row] and not is_end_B[row]:
                text.push(int(chosen_B[row]))
                is_end_B[row] |= text.stopped
        ended_B |= is_end_B
        ids_BT = np.concatenate([ids_BT, chosen_B[:, None]], axis=1)
        if ended_B.all() or made == budget - 1:
            for text in texts:
                text.end()
            yield chosen_B
            return
        yield chosen_B
        logits_BV = step(chosen_B[:, None])


def as_batch(
    inputs: Any, mask: Any, padding: int, vocab_size: int, *, pad_left: bool = True
) -> tuple[np.ndarray, np.ndarray]:
    """Ids (B, T) and mask (B, T), int64, from one row or several, of equal lengths or not (these are padded).

    Raises InputError for rows without a token, ids outside the vocabulary, a mask of another shape, and
    a mask for rows of different lengths.
    """
    rows: Any
    if hasattr(inputs, "ndim"):
        rows = np.atleast_2d(np.asarray(inputs))
    else:
        rows = [inputs] if len(inputs) and np.ndim(inputs[0]) == 0 else inputs
    if mask is None:
        width = max((len(row) for row in rows), default=0)
        ids, kept = np.full((len(rows), width), padding, np.int64), np.zeros((len(rows), width), np.int64)
        for i, row in enumerate(rows):
            here = slice(width - len(row), None) if pad_left else slice(len(row))
            ids[i, here], kept[i, here] = row, 1
    else:
        lengths = sorted({len(row) for row in rows})
        if len(lengths) > 1:
            raise InputError(
                f"an attention_mask is for rows of one length, not {' and '.join(map(str, lengths))}; without one they "
                "are padded"
            )
        ids, kept = np.asarray(rows, np.int64), np.atleast_2d(np.asarray(mask)).astype(np.int64)
    if ids.shape != kept.shape:
        raise InputError(f"attention_mask has shape {kept.shape}; expected that of the ids, {ids.shape}")
    empty = np.flatnonzero(kept.sum(1) == 0) if ids.size else np.zeros(1, int)
    if len(empty):
        raise InputError(f"prompt {empty[0]} is empty; give at least one token")
    wrong = ids[(ids < 0) | (ids >= vocab_size)]
    if wrong.size:
        raise InputError(f"token id {wrong[0]} lies outside the vocabulary of {vocab_size}; use this model's tokenizer")
    return ids, kept
