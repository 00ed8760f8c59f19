"""Sentence pairs as token ids, and batches of them as tensors.

`B` batch · `S` source length · `T` target length
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.utils.data import Dataset

from neural_layers.distill.data.pairs import DataError, SentencePair

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

IGNORED_LABEL = -100
"""The label at padding, which a loss leaves out."""


class TranslationDataset(Dataset[dict[str, list[int]]]):
    """Encoded pairs as {"input_ids", "labels"}, both with `</s>` at the end.

    A pair of which a side has more than `max_length` tokens is left out, because a cut target would teach wrong ends.

    Arguments:
        pairs:      the sentence pairs
        tokenizer:  encodes both sides
        max_length: the most tokens of a side, `</s>` included; None for no limit
    Attributes:
        pairs:   the pairs that are kept, in order
        dropped: how many were left out
    Raises:
        ValueError: `max_length` under 1
        DataError:  no pair is left
    """

    def __init__(
        self, pairs: Iterable[tuple[str, str]], tokenizer: "PreTrainedTokenizerFast", max_length: int | None
    ) -> None:
        if max_length is not None and max_length < 1:
            raise ValueError(f"max_length={max_length} must be at least 1, or None for no limit")
        given = [SentencePair(*pair) for pair in pairs]
        if not given:
            raise DataError("no sentence pairs; give at least one")
        sources = tokenizer([pair.source for pair in given])["input_ids"]
        targets = tokenizer([pair.target for pair in given])["input_ids"]
        lengths = [max(len(source), len(target)) for source, target in zip(sources, targets, strict=True)]
        kept = [row for row, length in enumerate(lengths) if max_length is None or length <= max_length]
        if not kept:
            raise DataError(
                f"all {len(given)} sentence pairs have more than max_length={max_length} tokens; "
                f"the shortest needs max_length={min(lengths)}"
            )
        self.pairs = [given[row] for row in kept]
        self.dropped = len(given) - len(kept)
        self._rows = [{"input_ids": sources[row], "labels": targets[row]} for row in kept]

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: int) -> dict[str, list[int]]:
        return self._rows[index]


class TranslationCollator:
    """Makes a batch of `TranslationDataset` rows: `input_ids` and `attention_mask` (B, S), `labels` (B, T), all int64.

    Sides are padded on the right to the longest of the batch; labels hold `IGNORED_LABEL` there. The model makes
    `decoder_input_ids` from the labels.

    Arguments:
        tokenizer:          its `pad_token_id` fills `input_ids`
        pad_to_multiple_of: lengths are rounded up to a multiple of it (8 suits tensor cores)
    Raises:
        ValueError: a tokenizer without padding token, a multiple under 1 or, when called, no rows
    """

    def __init__(self, tokenizer: "PreTrainedTokenizerFast", pad_to_multiple_of: int = 1) -> None:
        if tokenizer.pad_token_id is None:
            raise ValueError("the tokenizer has no pad_token; set one, for example tokenizer.pad_token = '<pad>'")
        if pad_to_multiple_of < 1:
            raise ValueError(f"pad_to_multiple_of={pad_to_multiple_of} must be at least 1")
        self.pad_token_id: int = tokenizer.pad_token_id
        self.pad_to_multiple_of = pad_to_multiple_of

    def __call__(self, rows: Sequence[Mapping[str, list[int]]]) -> dict[str, Tensor]:
        if not rows:
            raise ValueError("no rows to make a batch of; give at least one")
        sources = [row["input_ids"] for row in rows]
        return {
            "input_ids": self._pad(sources, self.pad_token_id),
            "attention_mask": self._pad([[1] * len(source) for source in sources], 0),
            "labels": self._pad([row["labels"] for row in rows], IGNORED_LABEL),
        }

    def _pad(self, lists: list[list[int]], value: int) -> Tensor:
        step = self.pad_to_multiple_of
        length = -(-max(map(len, lists)) // step) * step
        return torch.tensor([ids + [value] * (length - len(ids)) for ids in lists], dtype=torch.int64)
