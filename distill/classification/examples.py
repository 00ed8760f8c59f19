"""Labelled texts as token ids, and batches of them.

Letters: B batch, T length.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from neural_layers.distill.classification.augmentation import MedicalTextAugmenter


class TextExamples:
    """Texts with labels as `ExampleFeed` takes them: `len`, `[i]`, and `in_epoch(i, epoch)` in another wording.

    max_length: of a text in tokens; what is longer is cut at its end. `cut` counts those texts
    augmenter:  rewords training texts; None for texts as they are
    Without an augmenter the token ids are made once.
    """

    def __init__(
        self,
        texts: Sequence[str],
        labels: Sequence[int],
        tokenizer: Any,
        max_length: int,
        augmenter: MedicalTextAugmenter | None = None,
    ) -> None:
        self.texts, self.labels, self.tokenizer = texts, labels, tokenizer
        self.max_length, self.augmenter = max_length, augmenter
        # verbose: a text may be longer than the tokenizer's model takes, which is why it is cut.
        whole = tokenizer(list(texts), verbose=False)["input_ids"]
        self.cut = sum(len(ids) > max_length for ids in whole)
        self.token_ids = self._encoded(texts) if self.cut else whole

    @property
    def lengths(self) -> list[int]:
        """Of the texts as they are, in tokens."""
        return [len(ids) for ids in self.token_ids]

    def __len__(self) -> int:
        return len(self.texts)

    def __getitem__(self, number: int) -> dict[str, Any]:
        return {"input_ids": self.token_ids[number], "labels": self.labels[number]}

    def in_epoch(self, number: int, epoch: int) -> dict[str, Any]:
        """Example `number` as `epoch` words it."""
        if self.augmenter is None:
            return self[number]
        (ids,) = self._encoded([self.augmenter(self.texts[number], epoch, number)])
        return {"input_ids": ids, "labels": self.labels[number]}

    def _encoded(self, texts: Sequence[str]) -> list[list[int]]:
        return self.tokenizer(list(texts), truncation=True, max_length=self.max_length)["input_ids"]


class TextCollator:
    """Pads examples to the longest: input_ids (B, T), attention_mask (B, T), labels (B,).

    Padding stands on the side that the tokenizer names. Raises ValueError for a tokenizer without a padding token.
    """

    def __init__(self, tokenizer: Any) -> None:
        if tokenizer.pad_token_id is None:
            raise ValueError("the tokenizer has no pad_token; set one, such as its eos_token")
        self.pad, self.left = tokenizer.pad_token_id, tokenizer.padding_side == "left"

    def __call__(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        rows = [example["input_ids"] for example in examples]
        width = max(map(len, rows))
        ids_BT = torch.full((len(rows), width), self.pad)
        mask_BT = torch.zeros(len(rows), width, dtype=torch.long)
        for i, row in enumerate(rows):
            where = slice(width - len(row), None) if self.left else slice(len(row))
            ids_BT[i, where] = torch.tensor(row, dtype=torch.long)
            mask_BT[i, where] = 1
        labels_B = torch.tensor([example["labels"] for example in examples])
        return {"input_ids": ids_BT, "attention_mask": mask_BT, "labels": labels_B}
