"""Reading and writing files of sentence pairs: what is good comes back, what is bad says where and what to do."""

import gzip
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neural_layers.distill.data.pairs import DataError, SentencePair, read_pairs, write_pairs

PAIRS = [SentencePair("The cat sleeps.", "Die Katze schläft."), SentencePair("I laugh.", "Ich lache.")]
BIBLE = Path(__file__).parents[3] / "shared" / "data" / "translation_bible_en_de"


@pytest.mark.parametrize("name", ["pairs.tsv", "pairs.txt", "pairs.tsv.gz"])
def test_pairs_come_back_as_they_were_written(tmp_path: Path, name: str) -> None:
    write_pairs(tmp_path / name, PAIRS)
    assert read_pairs(tmp_path / name) == PAIRS
    assert os.listdir(tmp_path) == [name]


@given(st.lists(st.tuples(*[st.text(min_size=1)] * 2), min_size=1))
def test_any_text_that_is_written_comes_back(tmp_path_factory: pytest.TempPathFactory, pairs: list) -> None:
    path = tmp_path_factory.mktemp("any") / "pairs.tsv"
    try:
        write_pairs(path, pairs)
    except DataError:
        return
    assert read_pairs(path) == pairs


def test_windows_lines_a_byte_order_mark_and_blank_lines_at_the_end_are_read(tmp_path: Path) -> None:
    path = tmp_path / "pairs.tsv"
    path.write_bytes(b"\xef\xbb\xbfa\tb\r\n c \t d\r\n\r\n \n\n")
    assert read_pairs(path) == [("a", "b"), ("c", "d")]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "the file is empty; give one with lines"),
        (b"\n \n", "the file is empty; give one with lines"),
        (b"a\tb\nno tab\n", "line 2: 0 tabs instead of one: 'no tab'; write source<TAB>target"),
        (b"a\tb\tc\n", r"line 1: 2 tabs instead of one: 'a\\tb\\tc'"),
        (b"\tb\nc\td\n", r"line 1: the source is empty: '\\tb'; fill it in"),
        (b"a\tb\nc\t\nd\te\n", "line 2: the target is empty"),
        (b"a\tb\nc\t", "line 2: the target is empty"),
        (b"a\tb\n\nc\td\n", "line 2: blank line"),
        (b"a\tb\nc\td\xff\n", r"line 2: not UTF-8 \(byte 0xff at position 4\): .*; save the file as UTF-8"),
        (b"x" * 100, "'" + "x" * 57 + r"\.\.\.'"),
    ],
)
def test_a_bad_file_is_refused_with_line_text_and_remedy(tmp_path: Path, content: bytes, message: str) -> None:
    path = tmp_path / "bad.tsv"
    path.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        read_pairs(path)
    assert "bad.tsv" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no such file; check the path"):
        read_pairs(tmp_path / "none.tsv")
    with pytest.raises(DataError, match="is a folder; give one of the files"):
        read_pairs(tmp_path)


def test_broken_and_truncated_gzip_files_are_refused(tmp_path: Path) -> None:
    whole = gzip.compress(b"The cat sleeps.\tDie Katze.\n" * 50)
    contents = {"truncated": whole[:-12], "broken gzip": b"a\tb\n", "broken": whole[:30] + b"\x00\xff" * 9 + whole[48:]}
    for words, content in contents.items():
        path = tmp_path / "pairs.tsv.gz"
        path.write_bytes(content)
        with pytest.raises(DataError, match=words):
            read_pairs(path)


@pytest.mark.parametrize("pair", [("", "b"), ("a", "b\tc"), ("a\n", "b"), ("a", " b")])
def test_a_side_that_a_line_cannot_hold_is_not_written(tmp_path: Path, pair: tuple[str, str]) -> None:
    with pytest.raises(DataError, match="line 2: a side that a line cannot hold"):
        write_pairs(tmp_path / "pairs.tsv", [PAIRS[0], pair])
    assert os.listdir(tmp_path) == []


def test_an_interrupted_write_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "pairs.tsv"
    write_pairs(path, PAIRS)

    def full_disk(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full_disk)
    with pytest.raises(OSError, match="No space left"):
        write_pairs(path, PAIRS[:1])
    assert read_pairs(path) == PAIRS
    assert os.listdir(tmp_path) == ["pairs.tsv"]


def test_no_pairs_are_not_written(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no pairs to write"):
        write_pairs(tmp_path / "pairs.tsv", [])


@pytest.mark.skipif(not BIBLE.is_dir(), reason=f"the development data is not at {BIBLE}")
@pytest.mark.parametrize(("split", "count"), [("train", 13_319), ("valid", 424), ("test", 665)])
def test_real_files_are_read_whole(split: str, count: int) -> None:
    assert len(read_pairs(BIBLE / f"{split}.tsv.gz")) == count
