"""Labelled data: formats, several datasets with label maps, imbalance, batches, and what is refused."""

import csv
import gzip
import json
from collections import Counter

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

from neural_layers.distill.classification import ClassBalance, LabelMap, MedicalTextAugmenter, load_labelled
from neural_layers.distill.classification.data import Fields
from neural_layers.distill.classification.examples import TextCollator, TextExamples
from neural_layers.distill.classification.rows import read_rows
from neural_layers.distill.data.feed import ExampleFeed
from neural_layers.distill.text.tokenizing import bpe_tokenizer
from neural_layers.errors import InputError

ROWS = [{"text": "the lung, sore", "label": 0}, {"text": "ein „Herz“", "label": 1}, {"text": "a third", "label": 1}]


def write(path, rows=ROWS) -> str:
    if path.suffix in (".csv", ".tsv"):
        with path.open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",")
            writer.writerows([["text", "label"], *([row["text"], row["label"]] for row in rows)])
    elif path.suffix == ".parquet":
        pa, parquet = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
        parquet.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows), encoding="utf-8")
    else:
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        path.write_bytes(gzip.compress(lines.encode()) if path.suffix == ".gz" else lines.encode())
    return str(path)


@pytest.fixture
def three(tmp_path) -> dict[str, str]:
    return {split: write(tmp_path / f"{split}.jsonl") for split in ("train", "valid", "test")}


def load(files, **options):
    return load_labelled([files["train"]], [files["valid"]], [files["test"]], **options)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "a.csv", "a.tsv", "a.parquet"])
def test_every_format_gives_the_same_rows(tmp_path, name) -> None:
    write(tmp_path / name)
    rows = [row.fields for row in read_rows(tmp_path / name)]
    assert [(row["text"], int(row["label"])) for row in rows] == [(row["text"], row["label"]) for row in ROWS]


def test_a_folder_holds_the_splits_and_what_the_numbers_stand_for(tmp_path) -> None:
    for name in ("train.jsonl.gz", "dev.csv", "test.json"):
        write(tmp_path / name)
    (tmp_path / "labels.json").write_text('["lung", "heart"]')
    data = load_labelled([str(tmp_path)])
    assert data.classes == ("lung", "heart")
    assert data.train.labels == data.valid.labels == data.test.labels == (0, 1, 1)


def test_several_datasets_share_classes_through_their_label_maps(tmp_path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    for folder in (first, second):
        folder.mkdir()
    (first / "labels.json").write_text('["lung", "heart"]')
    other = [{"body": "x", "class": "cardiac"}, {"body": "y", "class": "skin"}, {"body": "z", "class": "junk"}]
    for folder in (first, second):
        for split in ("train", "valid", "test"):
            rows = [{"body": r["text"], "class": r["label"]} for r in ROWS] if folder == first else other
            write(folder / f"{split}.jsonl", rows)
    (tmp_path / "map.json").write_text('{"cardiac": "heart", "junk": null}')
    data = load_labelled(
        [f"a={first}", f"b={second}"], label_maps=[f"b={tmp_path / 'map.json'}"], fields=Fields("body", "class")
    )
    assert data.classes == ("lung", "heart", "skin")
    assert data.train.labels == (0, 1, 1, 1, 2)
    assert data.train.sources == ("a", "a", "a", "b", "b")
    assert data.train.texts[-1] == "y"


def test_classes_without_a_file_are_the_names_found_and_numbers_count_as_numbers(tmp_path, three) -> None:
    assert load(three).classes == ("0", "1")
    rows = [{"text": "t", "label": label} for label in (10, 9, 2)]
    files = {split: write(tmp_path / f"n{split}.jsonl", rows) for split in ("train", "valid", "test")}
    assert load(files).classes == ("2", "9", "10")
    names = tmp_path / "chosen.json"
    names.write_text('{"1": "heart", "0": "lung"}')
    assert load(three, labels=names).classes == ("lung", "heart")
    assert LabelMap(("lung", "heart")).name("heart", "here") == "heart"


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            '{"text": "x", "label": 2}',
            r"line 4: label 2 is outside the label map; it has 0 to 1 or one of: lung, heart",
        ),
        ('{"text": "x", "label": "skin"}', "line 4: label 'skin' is outside the label map"),
        ('{"text": "x", "label": 1.5}', "line 4: the label is 1.5"),
        ('{"text": "x", "label": true}', "line 4: the label is True"),
        ('{"text": "x"}', "line 4: no field 'label'; choose with --label-field among: text"),
        ('{"label": 1}', "line 4: no field 'text'; choose with --text-field among: label"),
        ('{"text": "  ", "label": 1}', "line 4: the field 'text' holds no text"),
        ("[1, 2]", "line 4: a row is an object"),
        ("{", "line 4: not JSON"),
    ],
)
def test_a_bad_row_is_named_with_its_line(tmp_path, three, line, message) -> None:
    (tmp_path / "labels.json").write_text('["lung", "heart"]')
    with open(three["train"], "a") as file:
        file.write(line + "\n")
    with pytest.raises(InputError, match=message):
        load(three)


def test_labels_outside_those_chosen_are_refused(tmp_path, three) -> None:
    names, renames = tmp_path / "chosen.json", tmp_path / "map.json"
    names.write_text('["lung", "heart"]')
    renames.write_text('{"heart": "cor"}')
    with pytest.raises(InputError, match=r"line 2: label 'cor' is outside the labels lung, heart"):
        load(three, labels=names, label_maps=[str(renames)])


def test_a_class_without_examples_and_empty_splits_are_refused(tmp_path, three) -> None:
    names = tmp_path / "chosen.json"
    names.write_text('["lung", "heart", "skin"]')
    with pytest.raises(InputError, match="class 'skin' has no training example"):
        load(three, labels=names)
    empty = tmp_path / "empty.jsonl"
    empty.write_text("\n")
    with pytest.raises(InputError, match="the valid data is empty"):
        load_labelled([three["train"]], [str(empty)], [three["test"]])
    with pytest.raises(InputError, match="the test data is empty"):
        load_labelled([three["train"]], [three["valid"]])
    one = write(tmp_path / "one.jsonl", [ROWS[0]])
    with pytest.raises(InputError, match="a classifier needs two or more"):
        load_labelled([one], [one], [one])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[1]", "a list of names"),
        ('["a", "a"]', "1 of them distinct"),
        ('{"1": "a"}', "0 to 0"),
        ("nonsense", "not JSON"),
    ],
)
def test_a_wrong_labels_file_is_named(tmp_path, three, content, message) -> None:
    (tmp_path / "chosen.json").write_text(content)
    with pytest.raises(InputError, match=message):
        load(three, labels=tmp_path / "chosen.json")


def test_datasets_are_told_apart_and_files_that_cannot_be_read_are_named(tmp_path, three) -> None:
    with pytest.raises(InputError, match="two datasets are called x"):
        load_labelled([f"x={three['train']}", f"x={three['test']}"])
    with pytest.raises(InputError, match="there is no dataset 'y'; there are data"):
        load(three, label_maps=["y=map.json"])
    with pytest.raises(InputError, match=r"missing\.jsonl: cannot be read"):
        load_labelled([str(tmp_path / "missing.jsonl")], [three["valid"]], [three["test"]])
    with pytest.raises(InputError, match="ends in none of"):
        load_labelled([str(tmp_path / "data.xls")], [three["valid"]], [three["test"]])
    (tmp_path / "bad.csv").write_text("text,label\nfine,1\ntoo,many,1\n")
    with pytest.raises(InputError, match="line 3: 3 fields, and the first line names 2"):
        load_labelled([str(tmp_path / "bad.csv")], [three["valid"]], [three["test"]])


def test_imbalance_is_told_and_the_weights_even_it_out() -> None:
    labels = [0] * 60 + [1] * 30 + [2] * 10
    balance = ClassBalance.of(labels, ("a", "b", "c"))
    sklearn_balanced = [100 / (3 * count) for count in (60, 30, 10)]  # compute_class_weight("balanced")
    assert balance.weights == pytest.approx(sklearn_balanced)
    assert balance.ratio == 6
    assert "a 60 to c 10, ratio 6.0; met with weights" in balance.sentence("weights")
    assert "about equally large" in ClassBalance.of([0, 1, 0, 1], ("a", "b")).sentence("none")
    weights = balance.example_weights(labels)
    assert np.mean(weights) == pytest.approx(1)
    assert [sum(w for w, x in zip(weights, labels, strict=True) if x == k) for k in range(3)] == pytest.approx(
        [100 / 3] * 3
    )
    with pytest.raises(ValueError, match="class 'b' has no example"):
        ClassBalance.of([0, 0], ("a", "b"))


@pytest.fixture(scope="module")
def tokenizer():
    return bpe_tokenizer(["the child with fever and a headache"] * 3, 280)


def test_sampling_by_weights_evens_out_the_classes(tokenizer) -> None:
    labels = [0] * 180 + [1] * 20
    examples = TextExamples(["fever"] * 200, labels, tokenizer, 8)
    weights = ClassBalance.of(labels, ("a", "b")).example_weights(labels)
    feed = ExampleFeed(examples, TextCollator(tokenizer), batch_size=50, weights=weights)
    batches = feed.batches(0)
    drawn = Counter(int(label) for _ in range(20) for label in next(batches)["labels"])
    assert 0.45 < drawn[1] / 1000 < 0.55


def test_batches_are_padded_on_the_tokenizers_side_and_cut(tokenizer) -> None:
    examples = TextExamples(["the child", "the child with fever and a headache"], [0, 1], tokenizer, 6)
    assert examples.cut == 1
    assert max(examples.lengths) == 6
    batch = TextCollator(tokenizer)([examples[0], examples[1]])
    assert batch["input_ids"].shape == batch["attention_mask"].shape == (2, 6)
    assert batch["labels"].tolist() == [0, 1]
    rows = [row[mask.bool()].tolist() for row, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True)]
    assert rows == examples.token_ids
    short = batch["attention_mask"][0]
    assert torch.equal(short, short.sort(descending=tokenizer.padding_side == "right").values)


def test_augmented_examples_change_with_the_epoch_and_are_the_same_when_a_run_resumes(tokenizer) -> None:
    augmenter = MedicalTextAugmenter(synonym_rate=0.5, insertion_rate=0.5)
    texts = ["the child with fever and a headache"] * 8
    examples = TextExamples(texts, [0, 1] * 4, tokenizer, 40, augmenter)
    assert examples.in_epoch(0, 0) == examples.in_epoch(0, 0)
    assert len({tuple(examples.in_epoch(0, epoch)["input_ids"]) for epoch in range(8)}) > 1
    feed = ExampleFeed(examples, TextCollator(tokenizer), batch_size=4)
    first = feed.batches(0)
    batches = [next(first) for _ in range(6)]
    again = next(feed.batches(5))
    assert all(torch.equal(again[name], batches[5][name]) for name in again)
