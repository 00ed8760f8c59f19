"""Teachers and students out of folders, and what is refused of them and of the options."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")
from transformers import (
    AutoTokenizer,
    BertConfig,
    BertForSequenceClassification,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
)

from neural_layers.distill.recipes.ntmm_models import load_classifier, shallower
from neural_layers.distill.recipes.ntmm_options import NTMMOptions
from neural_layers.distill.recipes.ntmm_preparing import described, read_data
from neural_layers.distill.recipes.recipe_run import RecipeRun
from neural_layers.distill.text.tokenizing import bpe_tokenizer
from neural_layers.errors import InputError
from neural_layers.models.conversion import convert_to_hybrid, from_transformers
from tests.distill.ntmm_runs import CUES, FILLING, distill, plain_report, refused, write_texts

__all__ = ["plain_report"]
pytestmark = pytest.mark.usefixtures("plain_report")
CLASSES = ("lung", "pain", "skin")
_COMMON = "--batch 4 --accumulate 2 --max-length 24 --steps 2 --threads 1 --min-retention 0"
COMMON = _COMMON.split()
SIZES = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
}


def qwen2_config(tokenizer, **changes) -> Qwen2Config:
    names = dict(enumerate(CLASSES))
    return Qwen2Config(
        vocab_size=len(tokenizer),
        **{**SIZES, "pad_token_id": 0, "id2label": names, **changes},
        tie_word_embeddings=True,
    )


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    """As transformers reads it beside a Qwen2 model: with Qwen2's own way of splitting texts."""
    folder = tmp_path_factory.mktemp("tokenizer")
    made = bpe_tokenizer([" ".join(FILLING), *(" ".join(words) for words in CUES.values())] * 3, 280)
    made.save_pretrained(folder)
    qwen2_config(made).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_texts(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def qwen2(tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "qwen2"
    torch.manual_seed(0)
    Qwen2ForSequenceClassification(qwen2_config(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def language_model(tokenizer, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "lm"
    torch.manual_seed(1)
    Qwen2ForCausalLM(qwen2_config(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_qwen2_teacher_is_fine_tuned_and_distilled_into_some_of_its_layers(qwen2, data, tmp_path) -> None:
    out = tmp_path / "run"
    options = ["--fine-tune-teacher", "--teacher-steps", 2, "--student-layers", 2]
    assert distill("--data", data, "--out", out, "--teacher", qwen2, *options, *COMMON) == 0
    report = json.loads((out / "report.json").read_text())
    models = report["models"]
    assert {model["architecture"] for model in models.values()} == {"Qwen2ForSequenceClassification"}
    assert models["student"]["parameters"] < models["teacher"]["parameters"]
    assert (out / "teacher" / "model.safetensors").is_file()


def test_a_qwen2_teacher_that_is_trained_is_distilled_into_a_hybrid(qwen2, data, tmp_path) -> None:
    out = tmp_path / "run"
    assert distill("--data", data, "--out", out, "--teacher", qwen2, "--student-width", 8, *COMMON) == 0
    models = json.loads((out / "report.json").read_text())["models"]
    assert models["student"]["architecture"] == "HybridForSequenceClassification"
    assert models["teacher"]["training"] is None
    assert not (out / "teacher").exists()


def test_a_converted_hybrid_is_a_student_with_its_weights(language_model, qwen2, tokenizer, data, tmp_path) -> None:
    hybrid = convert_to_hybrid(from_transformers(language_model, dtype=torch.float32), [1], mixer="mamba2")
    folder = tmp_path / "hybrid"
    hybrid.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    student = load_classifier(folder, CLASSES, new_head=True)
    for name, weight in hybrid.model.named_parameters():
        assert torch.equal(weight, student.model.get_parameter(name))
    assert [student.config.id2label[i] for i in range(3)] == list(CLASSES)
    options = ["--teacher", qwen2, "--student", folder, *COMMON]
    assert distill("--data", data, "--out", tmp_path / "run", *options) == 0


def test_some_layers_of_a_teacher_are_spread_evenly_and_keep_their_weights(qwen2) -> None:
    teacher = load_classifier(qwen2, CLASSES, new_head=False)
    student = shallower(teacher, 2, seed=0)
    theirs = teacher.state_dict()
    for name, weight in student.state_dict().items():
        assert torch.equal(weight, theirs[name.replace("layers.1.", "layers.2.")])
    torch.manual_seed(0)
    bert = BertForSequenceClassification(
        BertConfig(vocab_size=30, hidden_size=8, intermediate_size=8, num_hidden_layers=3, num_attention_heads=2)
    )
    assert shallower(bert, 1, seed=0).config.num_hidden_layers == 1
    with pytest.raises(InputError, match="--student-layers 3 must be fewer than the teacher's 3"):
        shallower(teacher, 3, seed=0)


def test_a_language_model_is_no_teacher_until_its_head_is_trained(language_model, data, tmp_path, capsys) -> None:
    options = ["--data", data, "--out", tmp_path / "run", "--teacher", language_model, *COMMON]
    said = refused(capsys, *options)
    assert "no trained head (score.weight is missing)" in said
    assert "--fine-tune-teacher" in said
    assert not (tmp_path / "run").exists()


def test_a_tokenizer_that_differs_is_refused_naming_both(qwen2, tokenizer, data, tmp_path, capsys) -> None:
    other = bpe_tokenizer(["other words altogether"] * 4, 280)
    folder = tmp_path / "student"
    shutil.copytree(qwen2, folder)
    other.save_pretrained(folder)
    options = ["--data", data, "--out", tmp_path / "run", "--teacher", qwen2, *COMMON]
    said = refused(capsys, *options, "--student", folder)
    assert f"the student in {folder}" in said
    assert f"the teacher in {qwen2}" in said
    assert "differs" in said
    assert f"--tokenizer {folder}" in refused(capsys, *options, "--tokenizer", folder)
    assert "has its own" in refused(capsys, *options, "--tokenizer", "bpe:300")


def test_a_teacher_of_other_classes_is_refused(qwen2, tokenizer, data, tmp_path, capsys) -> None:
    options = ["--data", data, "--out", tmp_path / "run", *COMMON]
    for names, message in (
        (("lung", "skin", "pain"), "class 1 of the teacher in"),
        (("a", "b"), "has 2 classes and the data 3"),
    ):
        folder = tmp_path / "-".join(names)
        Qwen2ForSequenceClassification(qwen2_config(tokenizer, id2label=dict(enumerate(names)))).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        assert message in refused(capsys, *options, "--teacher", folder)
    order = tmp_path / "labels.json"
    order.write_text('["lung", "skin", "pain"]')
    assert load_classifier(tmp_path / "lung-skin-pain", ("lung", "skin", "pain"), new_head=False) is not None
    assert distill(*options, "--teacher", tmp_path / "lung-skin-pain", "--labels", order, "--student-width", 8) == 0


def test_folders_that_hold_no_usable_model_are_named(qwen2, data, tmp_path, capsys) -> None:
    options = ["--data", data, "--out", tmp_path / "run", *COMMON]
    assert "there is no folder" in refused(capsys, *options, "--teacher", tmp_path / "nowhere")
    for name, spoil, message in (
        ("pickled", lambda f: (f / "model.safetensors").rename(f / "pytorch_model.bin"), "safetensors alone"),
        ("cut", lambda f: (f / "model.safetensors").write_bytes(b"\0" * 50), "cannot be read as a classifier"),
        ("mute", lambda f: (f / "tokenizer.json").unlink(), "tokenizer"),
    ):
        folder = tmp_path / name
        shutil.copytree(qwen2, folder)
        spoil(folder)
        assert message in refused(capsys, *options, "--teacher", folder)
    config = json.loads((qwen2 / "config.json").read_text())
    folder = tmp_path / "deeper"
    shutil.copytree(qwen2, folder)
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 4, "layer_types": None}))
    assert "do not fit its config.json" in refused(capsys, *options, "--teacher", folder)
    assert "takes 64 tokens; give --max-length 64" in refused(
        capsys, "--data", data, "--out", tmp_path / "run", "--teacher", qwen2, "--max-length", 100
    )
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--imbalance cleverly", "--imbalance cleverly must be one of none, weights, sampling"),
        ("--min-retention 1.5", "min_retention=1.5"),
        ("--max-drop 0", "max_drop=0.0"),
        ("--metric bleu", "--metric bleu must be one of accuracy, macro_f1"),
        ("--precision fp16", "--precision fp16 needs a GPU"),
        ("--fine-tune-teacher", "--fine-tune-teacher needs --teacher"),
        ("--student a --student-layers 1", "--student and --student-layers"),
        ("--synonyms table.json", "tables of --augment"),
        ("--epochs 0", "--epochs 0.0 must be a positive number"),
        ("--label-smoothing 1", "--label-smoothing 1.0 must lie in"),
        ("--compress onnx", "classifiers are not exported to ONNX"),
        ("--student-mixers mamba,conv", "--mixers conv is unknown"),
        ("--tokenizer bpe:many", "write bpe:VOCABULARY with a number"),
        ("--batch 64 --accumulate 4", "is more than the 64 training texts"),
        ("--temperature 0", "temperature"),
        ("--student-heads 5", "must be a multiple of num_attention_heads=5"),
        ("--seed -1", "--seed -1 is out of range"),
        ("--threads 0", "--threads 0 must be at least 1"),
    ],
)
def test_options_that_cannot_be_are_told_in_one_line_before_anything_is_written(
    data, tmp_path, capsys, arguments, message
) -> None:
    if torch.cuda.is_available() and "fp16" in arguments:
        pytest.skip("the device can")
    said = refused(capsys, "--data", data, "--out", tmp_path / "run", *arguments.split())
    assert message in said
    assert not (tmp_path / "run").exists()


def test_validation_texts_that_are_trained_on_are_told(data, tmp_path) -> None:
    train, test = str(data / "train.jsonl"), str(data / "test.jsonl")
    _, lines = read_data(NTMMOptions(data=(train,), valid=(train,), test=(test,), out=tmp_path / "run"))
    assert any("the valid data is the training data (64 texts)" in line for line in lines)
    assert "the largest to the smallest is pain 26 to lung 12, ratio 2.2" in lines[1]


def test_data_that_has_changed_does_not_continue_a_run(tmp_path) -> None:
    data = write_texts(tmp_path / "data")
    options = NTMMOptions(data=(str(data),), out=tmp_path / "run")
    config = {"options": options.record(), "data": described(read_data(options)[0], options)}
    RecipeRun("ntmm", options).begin(config)
    RecipeRun("ntmm", options).begin(config)
    write_texts(data, seed=1)
    with pytest.raises(InputError, match="the data has changed since the run"):
        RecipeRun("ntmm", options).begin({**config, "data": described(read_data(options)[0], options)})
    with pytest.raises(InputError, match="holds no run to resume"):
        RecipeRun("ntmm", replace(options, out=tmp_path / "none", resume=True))
