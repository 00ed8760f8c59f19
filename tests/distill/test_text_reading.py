"""Documents from files: every format, and what is said of broken ones."""

import gzip
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from neural_layers.distill.text import pieces
from neural_layers.distill.text.errors import TextError
from neural_layers.distill.text.pieces import one_document, split_documents
from neural_layers.distill.text.reading import ReadingOptions, read_file

TEXTS = ["Grüße, 世界!\n", "two\nlines", "a"]


def documents(found) -> list[str]:
    result: list[str] = []
    for piece in found:
        if piece.begins:
            result.append("")
        result[-1] += piece.text
    return result


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


def parquet_bytes(rows: dict[str, list]) -> bytes:
    pyarrow = pytest.importorskip("pyarrow", reason="pyarrow is not installed")
    parquet = pytest.importorskip("pyarrow.parquet")
    sink = pyarrow.BufferOutputStream()
    parquet.write_table(pyarrow.table(rows), sink)
    return sink.getvalue().to_pybytes()


@pytest.mark.parametrize("gz", ["", ".gz"])
@pytest.mark.parametrize("kind", ["txt", "jsonl", "json", "parquet"])
def test_every_format_gives_the_documents_that_were_written(tmp_path, kind: str, gz: str) -> None:
    rows = [{"text": text, "other": 1} for text in TEXTS]
    content = {
        "txt": lambda: "<sep>".join(TEXTS).encode(),
        "jsonl": lambda: "\n".join(json.dumps(row) for row in rows).encode(),
        "json": lambda: json.dumps(rows).encode(),
        "parquet": lambda: parquet_bytes({"text": TEXTS, "other": [1, 2, 3]}),
    }[kind]()
    path = write(tmp_path / f"data.{kind}{gz}", content)
    assert documents(read_file(path, ReadingOptions(separator="<sep>"))) == TEXTS


def test_a_text_file_is_one_document_unless_a_separator_is_given(tmp_path) -> None:
    path = write(tmp_path / "a.txt", "\ufeffone\n\n\n\ntwo\n\n \n\n".encode())
    assert documents(read_file(path, ReadingOptions())) == ["one\n\n\n\ntwo\n\n \n\n"]
    assert documents(read_file(path, ReadingOptions(separator="\n\n"))) == ["one", "two"]


def test_rows_may_be_strings_and_a_field_may_have_any_name(tmp_path) -> None:
    path = write(tmp_path / "a.jsonl", b'"one"\n\n{"body": "two"}\n')
    assert documents(read_file(path, ReadingOptions(text_field="body"))) == ["one", "two"]
    assert documents(read_file(write(tmp_path / "a.json", b'{"text": "x"}'), ReadingOptions())) == ["x"]


@given(st.lists(st.text(alphabet="ab \n|", max_size=40), max_size=6), st.integers(1, 7), st.integers(2, 9))
def test_pieces_of_any_size_give_back_the_text(parts: list[str], size: int, limit: int) -> None:
    whole = "".join(parts)
    cut = [whole[i : i + size] for i in range(0, len(whole), size)]
    before, pieces.PIECE_CHARACTERS = pieces.PIECE_CHARACTERS, limit
    try:
        assert documents(one_document(cut)) == ([whole] if whole else [])
        expected = [part for part in whole.split("||") if part.strip()]
        found = documents(split_documents(cut, "||"))
        assert [part.lstrip() for part in found] == [part.lstrip() for part in expected]
    finally:
        pieces.PIECE_CHARACTERS = before


def test_a_long_document_comes_in_pieces_that_are_cut_before_white_space() -> None:
    text = "word and\n\nmore " * 60_000
    found = list(one_document([text]))
    assert len(found) > 2
    assert "".join(piece.text for piece in found) == text
    assert all(piece.text[0].isspace() and not piece.text[-1].isspace() for piece in found[1:-1])
    assert [piece.begins for piece in found] == [True] + [False] * (len(found) - 1)
    assert [piece.ends for piece in found] == [False] * (len(found) - 1) + [True]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"good\n\xff\xfe", "not UTF-8 at byte 5; save the file as UTF-8"),
        ("a.jsonl", b'{"text": "a"}\n{"text": ', "a.jsonl: line 2: not JSON (Expecting value at column 10)"),
        ("a.jsonl", b'{"text": "a"}\n[1]', "line 2: a row is an object or a string, and not list"),
        (
            "a.jsonl",
            b'{"body": "a", "id": 1}',
            "line 1: no field 'text'; choose with --text-field among: body, id",
        ),
        ("a.jsonl", b'{"text": 3}', "line 1: the field 'text' holds int and not text"),
        ("a.jsonl", b'{"text": "\xff"}', "line 1: not UTF-8 at byte 10"),
        ("a.json", b'[\n{"text": "a"},\n]', "a.json: line 3: not JSON"),
        ("a.parquet", b"PAR1 and not parquet", "broken parquet file"),
        ("a.csv", b"text", "the name ends in none of .txt, .json, .jsonl, .parquet"),
    ],
)
def test_broken_files_are_told_with_place_and_remedy(tmp_path, name: str, content: bytes, message: str) -> None:
    path = write(tmp_path / name, content)
    with pytest.raises(TextError) as caught:
        list(read_file(path, ReadingOptions()))
    assert message in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_parquet_file_without_the_field_lists_its_fields(tmp_path) -> None:
    path = write(tmp_path / "a.parquet", parquet_bytes({"body": ["a"], "id": [1]}))
    with pytest.raises(TextError, match="no field 'text'; choose with --text-field among: body, id"):
        list(read_file(path, ReadingOptions()))


@pytest.mark.parametrize("damage", ["truncated", "plain", "flipped"])
def test_broken_gzip_files_are_told(tmp_path, damage: str) -> None:
    good = gzip.compress(b"some text that is long enough to be cut off in the middle " * 50)
    content = {"truncated": good[:-20], "plain": b"plain text", "flipped": good[:30] + b"\xff\x00\xff" + good[33:]}[
        damage
    ]
    path = tmp_path / "a.txt.gz"
    path.write_bytes(content)
    with pytest.raises(TextError, match="gzip file"):
        list(read_file(path, ReadingOptions()))


def test_a_missing_file_is_told(tmp_path) -> None:
    with pytest.raises(TextError, match="cannot be read .No such file or directory.; check the path"):
        list(read_file(tmp_path / "missing.txt", ReadingOptions()))
