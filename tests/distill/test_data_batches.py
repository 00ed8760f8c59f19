"""Datasets and batches of sentence pairs: lengths, padding and what is left out."""

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from neural_layers.distill.data.batches import TranslationCollator, TranslationDataset
from neural_layers.distill.data.corpus import generate_corpus
from neural_layers.distill.data.pairs import DataError
from neural_layers.distill.data.tokenizer import train_tokenizer

PAIRS = generate_corpus((200, 0, 0)).train


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(PAIRS, 500)


def test_a_dataset_holds_both_sides_with_the_end_token(tokenizer: PreTrainedTokenizerFast) -> None:
    dataset = TranslationDataset(PAIRS, tokenizer, max_length=None)
    assert (len(dataset), dataset.dropped, dataset.pairs) == (200, 0, PAIRS)
    row = dataset[7]
    assert set(row) == {"input_ids", "labels"}
    assert row["input_ids"] == tokenizer(PAIRS[7].source)["input_ids"]
    assert row["labels"] == tokenizer(PAIRS[7].target)["input_ids"]
    assert row["input_ids"][-1] == row["labels"][-1] == 2


def test_pairs_over_the_length_are_left_out_and_counted(tokenizer: PreTrainedTokenizerFast) -> None:
    dataset = TranslationDataset(PAIRS, tokenizer, max_length=20)
    longest = [max(len(tokenizer(side)["input_ids"]) for side in pair) for pair in PAIRS]
    assert dataset.pairs == [pair for pair, length in zip(PAIRS, longest, strict=True) if length <= 20]
    assert dataset.dropped == 200 - len(dataset) > 0


def test_a_batch_is_padded_to_its_longest_row(tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"input_ids": [5, 6, 2], "labels": [7, 2]}, {"input_ids": [5, 2], "labels": [7, 8, 9, 2]}]
    batch = TranslationCollator(tokenizer)(rows)
    assert batch["input_ids"].tolist() == [[5, 6, 2], [5, 2, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]
    assert batch["labels"].tolist() == [[7, 2, -100, -100], [7, 8, 9, 2]]
    assert {tensor.dtype for tensor in batch.values()} == {torch.int64}


@pytest.mark.parametrize("multiple", [1, 7, 8])
def test_a_batch_can_be_padded_to_a_multiple(tokenizer: PreTrainedTokenizerFast, multiple: int) -> None:
    dataset = TranslationDataset(PAIRS, tokenizer, max_length=64)
    loader = torch.utils.data.DataLoader(
        dataset, batch_size=33, collate_fn=TranslationCollator(tokenizer, pad_to_multiple_of=multiple)
    )
    first = 0
    for batch in loader:
        rows = [dataset[index] for index in range(first, first + len(batch["labels"]))]
        first += len(rows)
        for name in ("input_ids", "labels"):
            longest = max(len(row[name]) for row in rows)
            assert batch[name].shape[1] % multiple == 0
            assert longest <= batch[name].shape[1] < longest + multiple
        assert batch["attention_mask"].sum(1).tolist() == [len(row["input_ids"]) for row in rows]
        assert (batch["labels"] != -100).sum(1).tolist() == [len(row["labels"]) for row in rows]
    assert first == len(dataset)


def test_bad_arguments_are_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ValueError, match="max_length=0 must be at least 1"):
        TranslationDataset(PAIRS, tokenizer, max_length=0)
    with pytest.raises(DataError, match=r"all 200 sentence pairs have more than max_length=2 tokens; the shortest"):
        TranslationDataset(PAIRS, tokenizer, max_length=2)
    with pytest.raises(DataError, match="no sentence pairs"):
        TranslationDataset([], tokenizer, max_length=8)
    with pytest.raises(ValueError, match="pad_to_multiple_of=0"):
        TranslationCollator(tokenizer, pad_to_multiple_of=0)
    with pytest.raises(ValueError, match="no rows"):
        TranslationCollator(tokenizer)([])
    with pytest.raises(ValueError, match="no pad_token"):
        TranslationCollator(PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer))
