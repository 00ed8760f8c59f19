"""The cache of tokens: found again by content, made again where anything differs, never half there."""

import json

import numpy as np
import pytest

pytest.importorskip("transformers", reason="transformers is not installed")

from neural_layers.distill.text.errors import TextError
from neural_layers.distill.text.reading import ReadingOptions
from neural_layers.distill.text.sources import parse_sources
from neural_layers.distill.text.store import open_store
from neural_layers.distill.text.tokenizing import bpe_tokenizer, character_tokenizer

TEXT = "one two\n\nthree é"
TOKENIZER = character_tokenizer([TEXT])


def parts_of(*paths):
    return [part for source in parse_sources([str(path) for path in paths]) for part in source.parts]


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text(TEXT, encoding="utf-8")
    return path


def test_a_store_holds_the_documents_and_their_ends(tmp_path, file) -> None:
    store = open_store(parts_of(file), TOKENIZER, ReadingOptions(separator="\n\n"), tmp_path / "cache")
    first, second = np.split(store.tokens, store.starts[1:])
    assert TOKENIZER.decode(first) == "one two<|endoftext|>"
    assert TOKENIZER.decode(second) == "three é<|endoftext|>"
    assert store.text_bytes == len(b"one two") + len("three é".encode())


def test_the_second_run_finds_the_tokens_of_the_first(tmp_path, file) -> None:
    first = open_store(parts_of(file), TOKENIZER, ReadingOptions(), tmp_path / "cache")
    moved = file.rename(tmp_path / "another name.txt")
    second = open_store(parts_of(moved), TOKENIZER, ReadingOptions(), tmp_path / "cache")
    assert (first.reused, second.reused) == (False, True)
    assert first.key == second.key
    assert np.array_equal(first.tokens, second.tokens)
    assert np.array_equal(first.starts, second.starts)
    assert first.text_bytes == second.text_bytes


@pytest.mark.parametrize("change", ["content", "tokenizer", "separator", "field"])
def test_anything_that_changes_the_tokens_makes_them_anew(tmp_path, file, change: str) -> None:
    before = open_store(parts_of(file), TOKENIZER, ReadingOptions(), tmp_path / "cache")
    tokenizer, options = TOKENIZER, ReadingOptions()
    if change == "content":
        file.write_text(TEXT.replace("t", "T"))
    elif change == "tokenizer":
        tokenizer = bpe_tokenizer([TEXT], 260)
    elif change == "separator":
        options = ReadingOptions(separator="\n\n")
    else:
        options = ReadingOptions(text_field="body")
    after = open_store(parts_of(file), tokenizer, options, tmp_path / "cache")
    assert not after.reused
    assert after.key != before.key
    assert open_store(parts_of(file), tokenizer, options, tmp_path / "cache").reused


def test_a_damaged_cache_is_made_again_and_holds_no_pickle(tmp_path, file) -> None:
    cache = tmp_path / "cache"
    before = open_store(parts_of(file), TOKENIZER, ReadingOptions(), cache)
    (folder,) = cache.iterdir()
    assert {path.name for path in folder.iterdir()} == {"tokens.bin", "starts.bin", "meta.json"}
    json.loads((folder / "meta.json").read_text())
    expected = before.tokens.tolist()
    (folder / "tokens.bin").write_bytes(b"\0")
    after = open_store(parts_of(file), TOKENIZER, ReadingOptions(), cache)
    assert not after.reused
    assert after.tokens.tolist() == expected


def test_an_unreadable_text_leaves_nothing_in_the_cache(tmp_path) -> None:
    broken = tmp_path / "a.jsonl"
    broken.write_text('{"text": "good"}\n{"text"')
    empty = tmp_path / "b.txt"
    empty.write_text("")
    for path, message in ((broken, "line 2: not JSON"), (empty, "no text in it")):
        with pytest.raises(TextError, match=message):
            open_store(parts_of(path), TOKENIZER, ReadingOptions(), tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_a_vocabulary_beyond_sixteen_bits_is_stored_whole(tmp_path, file) -> None:
    class Wide:
        eos_token_id = 70_000
        backend_tokenizer = None

        def get_vocab(self):
            return {"a": 69_999, "end": 70_000}

        def __call__(self, texts, **options):
            return {"input_ids": [[69_999] * 3 for _ in texts]}

    store = open_store(parts_of(file), Wide(), ReadingOptions(), tmp_path / "cache")
    assert store.tokens.tolist() == [69_999, 69_999, 69_999, 70_000]
