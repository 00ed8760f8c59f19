"""Tokenizers for language models."""

import pytest

pytest.importorskip("transformers", reason="transformers is not installed")

from hypothesis import given
from hypothesis import strategies as st

from neural_layers.distill.text.errors import TextError
from neural_layers.distill.text.tokenizing import (
    END,
    bpe_tokenizer,
    character_tokenizer,
    fingerprint,
    load_text_tokenizer,
    token_ids,
)
from neural_layers.errors import InputError

TEXT = "the cat sat on the mat;\n\nthe  dog\tate the 世界 Grüße\r\n"
CHARACTERS, BPE = character_tokenizer([TEXT]), bpe_tokenizer([TEXT] * 3, 270)


@given(st.text(alphabet=sorted(set(TEXT)), max_size=60))
def test_characters_come_back_exactly(text: str) -> None:
    (ids,) = token_ids(CHARACTERS, [text])
    assert len(ids) == len(text)
    assert CHARACTERS.decode(ids) == text


@given(st.text(alphabet=st.characters(exclude_categories=["Cs"]), max_size=60))
def test_bpe_gives_back_any_text_exactly(text: str) -> None:
    (ids,) = token_ids(BPE, [text])
    assert BPE.decode(ids) == text


def test_unknown_characters_and_names_of_special_tokens_are_text() -> None:
    unknown = CHARACTERS.unk_token_id
    assert token_ids(CHARACTERS, ["cat é", "€"]) == [token_ids(CHARACTERS, ["cat "])[0] + [unknown], [unknown]]
    for tokenizer in (CHARACTERS, BPE):
        assert tokenizer.eos_token_id not in token_ids(tokenizer, [f"a{END}b"])[0]
    assert BPE.decode(token_ids(BPE, [f"a{END}b"])[0]) == f"a{END}b"


@pytest.mark.parametrize("tokenizer", [CHARACTERS, BPE])
def test_a_saved_tokenizer_is_the_same_by_auto_tokenizer(tmp_path, tokenizer) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = load_text_tokenizer(tmp_path)
    assert fingerprint(loaded) == fingerprint(tokenizer)
    assert token_ids(loaded, [TEXT, f"{END}?"]) == token_ids(tokenizer, [TEXT, f"{END}?"])
    assert loaded.decode(token_ids(loaded, [TEXT])[0]) == TEXT
    assert loaded.eos_token_id == tokenizer.eos_token_id == loaded.pad_token_id


def test_fingerprints_tell_tokenizers_apart_and_not_how_they_were_called() -> None:
    assert fingerprint(CHARACTERS) != fingerprint(BPE)
    assert fingerprint(CHARACTERS) != fingerprint(character_tokenizer([TEXT + "z"]))
    again = character_tokenizer([TEXT[::-1]])
    assert fingerprint(CHARACTERS) == fingerprint(again)
    again(["a", "cat"], padding=True, truncation=True, max_length=2)
    assert fingerprint(CHARACTERS) == fingerprint(again)


def test_wrong_tokenizers_are_told(tmp_path) -> None:
    with pytest.raises(InputError, match="bpe:100 is too small; .* at least 257"):
        bpe_tokenizer([TEXT], 100)
    for make in (character_tokenizer, lambda texts: bpe_tokenizer(texts, 300)):
        with pytest.raises(TextError, match="no text to"):
            make([])
    with pytest.raises(InputError, match="is no folder; --tokenizer takes char"):
        load_text_tokenizer(tmp_path / "chars")
    with pytest.raises(InputError, match="holds no tokenizer.json"):
        load_text_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match="cannot be read"):
        load_text_tokenizer(tmp_path)
