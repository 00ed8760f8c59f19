"""`--data SOURCE[=WEIGHT]`: what it finds, and what is said where it finds nothing."""

import json

import pytest

from neural_layers.distill.text.errors import TextError
from neural_layers.distill.text.reading import ReadingOptions
from neural_layers.distill.text.sources import parse_sources
from neural_layers.errors import InputError


def names(parts) -> list[str]:
    return [part.name.rsplit("/", 1)[-1] for part in parts]


@pytest.fixture
def corpus(tmp_path):
    for name in ("b.txt", "a.jsonl", "sub/c.txt.gz", "notes.md", ".hidden/d.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("x")
    return tmp_path


def test_a_folder_gives_its_readable_files_in_the_order_of_their_names(corpus) -> None:
    (source,) = parse_sources([str(corpus)])
    assert names(source.parts) == ["a.jsonl", "b.txt", "c.txt.gz"]
    assert not source.valid


def test_a_pattern_gives_what_it_matches(corpus) -> None:
    (source,) = parse_sources([f"{corpus}/**/*.txt*"])
    assert names(source.parts) == ["b.txt", "c.txt.gz"]


def test_a_folder_that_divides_its_files_trains_on_those_of_train(tmp_path) -> None:
    for name in ("train-1.txt", "train-2.txt", "valid.txt", "test.txt"):
        (tmp_path / name).write_text("x")
    (source,) = parse_sources([str(tmp_path)])
    assert names(source.parts) == ["train-1.txt", "train-2.txt"]
    assert names(source.valid) == ["valid.txt"]


def test_weights_are_read_behind_the_last_equals_sign_of_a_name_that_is_no_file(tmp_path) -> None:
    for name in ("a.txt", "odd=2.txt"):
        (tmp_path / name).write_text("x")
    sources = parse_sources([f"{tmp_path}/a.txt=0.25", f"{tmp_path}/odd=2.txt", f"{tmp_path}/odd=2.txt=3"])
    assert [source.weight for source in sources] == [0.25, 1.0, 3.0]


@pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf"])
def test_weights_that_are_not_positive_are_refused(corpus, weight: str) -> None:
    with pytest.raises(InputError, match=f"weight {weight} must be a positive number"):
        parse_sources([f"{corpus}={weight}"])


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("{}/missing.txt", "no such file or folder; a dataset of the Hugging Face hub is written hf:"),
        ("{}/b.txt=heavy", "'heavy' is no weight and no such file exists; write SOURCE=WEIGHT"),
        ("{}/*.parquet", "the pattern matches no file that ends in .txt"),
        ("{}/notes.md", "the name ends in none of .txt"),
        ("hf:", "write hf:NAME"),
        ("hf:a:b:c:d", "write hf:NAME"),
        ("=2", "a weight without a source"),
    ],
)
def test_sources_that_do_not_exist_are_told_with_a_remedy(corpus, spec: str, message: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_sources([spec.format(corpus)])
    assert message in str(caught.value)


def test_an_empty_folder_is_told(tmp_path) -> None:
    with pytest.raises(InputError, match="the folder holds no file that ends in"):
        parse_sources([str(tmp_path)])
    with pytest.raises(InputError, match="no data; give --data"):
        parse_sources([])


def test_datasets_are_read_from_disk_and_from_local_folders(tmp_path) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    rows = datasets.Dataset.from_dict({"text": ["one", "two"]})
    rows.save_to_disk(str(tmp_path / "saved"))
    datasets.DatasetDict({"train": rows, "extra": rows.select([1])}).save_to_disk(str(tmp_path / "split"))
    (tmp_path / "loose").mkdir()
    (tmp_path / "loose" / "train.jsonl").write_text(json.dumps({"text": "three"}) + "\n")
    for spec, expected in (
        (f"{tmp_path}/saved", ["one", "two"]),
        (f"{tmp_path}/split", ["one", "two"]),
        (f"hf:{tmp_path}/split::extra", ["two"]),
        (f"hf:{tmp_path}/loose", ["three"]),
    ):
        (source,) = parse_sources([spec])
        (part,) = source.parts
        for streaming in (False, True):
            assert [piece.text for piece in part.read(ReadingOptions(), streaming)] == expected
        assert part.digest() == part.digest()
    (source,) = parse_sources([f"hf:{tmp_path}/split::absent"])
    with pytest.raises(TextError, match="no split 'absent'; choose among: train, extra"):
        list(source.parts[0].read(ReadingOptions()))
    (source,) = parse_sources([f"hf:{tmp_path}/nowhere"])
    with pytest.raises(TextError, match="the dataset cannot be loaded"):
        list(source.parts[0].read(ReadingOptions()))
