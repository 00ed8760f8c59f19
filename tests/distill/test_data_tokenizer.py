"""The joint tokenizer: nothing is unknown, decoding gives the text back, and a fingerprint tells vocabularies apart."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from neural_layers.distill.data.corpus import generate_corpus
from neural_layers.distill.data.pairs import DataError
from neural_layers.distill.data.tokenizer import train_tokenizer, vocabulary_fingerprint

PAIRS = generate_corpus((500, 0, 0)).train


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return train_tokenizer(PAIRS, 600)


def test_special_tokens_have_the_documented_ids(tokenizer: PreTrainedTokenizerFast) -> None:
    assert tokenizer.convert_tokens_to_ids(["<pad>", "<s>", "</s>"]) == [0, 1, 2]
    assert (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert (tokenizer.unk_token, tokenizer.padding_side, len(tokenizer)) == (None, "right", 600)


def test_an_encoded_sentence_ends_with_the_end_token_and_decodes_to_itself(tokenizer: PreTrainedTokenizerFast) -> None:
    for text in (side for pair in PAIRS[:200] for side in pair):
        ids = tokenizer(text)["input_ids"]
        assert ids.count(2) == 1
        assert ids[-1] == 2
        assert tokenizer.decode([1, *ids, 0, 0], skip_special_tokens=True) == text


@given(st.text() | st.sampled_from(["a </s> b", "<pad>", " x , y .", "l 'ami n't", "日本語 🙂", "\n\t ", ""]))
def test_any_text_decodes_to_itself(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    assert not {0, 1, 2} & set(ids[:-1])


def test_a_batch_is_padded_on_the_right(tokenizer: PreTrainedTokenizerFast) -> None:
    batch = tokenizer(["Yes.", "The doctor sleeps in the garden."], padding=True)
    assert set(batch) == {"input_ids", "attention_mask"}
    assert batch["input_ids"][0][-1] == 0
    assert batch["attention_mask"][0][-1] == 0


def test_a_saved_tokenizer_loads_as_the_same(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    for text in ("Der Arzt schläft , jetzt .", "a </s> b", "été 🙂"):
        loaded = AutoTokenizer.from_pretrained(tmp_path)
        assert loaded(text)["input_ids"] == tokenizer(text)["input_ids"]
        assert loaded.decode(loaded(text)["input_ids"], skip_special_tokens=True) == text
    assert vocabulary_fingerprint(loaded) == vocabulary_fingerprint(tokenizer)


def test_training_again_gives_the_same_vocabulary_and_other_pairs_another_one(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    assert vocabulary_fingerprint(train_tokenizer(PAIRS, 600)) == vocabulary_fingerprint(tokenizer)
    assert vocabulary_fingerprint(train_tokenizer(PAIRS, 601)) != vocabulary_fingerprint(tokenizer)
    assert vocabulary_fingerprint(train_tokenizer(PAIRS[:250], 600)) != vocabulary_fingerprint(tokenizer)


def test_a_lowercase_tokenizer_drops_case() -> None:
    tokenizer = train_tokenizer(PAIRS, 600, lowercase=True)
    assert tokenizer.decode(tokenizer("Der ARZT.")["input_ids"], skip_special_tokens=True) == "der arzt."
    assert vocabulary_fingerprint(tokenizer) != vocabulary_fingerprint(train_tokenizer(PAIRS, 600))


def test_a_corpus_too_small_for_the_size_gives_a_smaller_vocabulary() -> None:
    assert 259 < len(train_tokenizer([("a cat", "eine Katze")], 1_000)) < 300


def test_bad_arguments_are_refused() -> None:
    with pytest.raises(ValueError, match="vocab_size=258 must be at least 259"):
        train_tokenizer(PAIRS, 258)
    with pytest.raises(DataError, match="no pairs"):
        train_tokenizer([], 600)
    with pytest.raises(TypeError, match="not a fast tokenizer"):
        vocabulary_fingerprint(object())  # type: ignore[arg-type]
