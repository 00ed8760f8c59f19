"""`neural-layers convert`: what it writes, what it prints, and one line for bad input."""

import json
import shutil

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

from neural_layers.cli import main
from neural_layers.cli.convert import chosen_layers
from neural_layers.models.conversion import convert_to_hybrid, from_transformers
from neural_layers.models.hybrid import HybridForCausalLM
from tests.models.peers import VOCABULARY, make_peer


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Llama model with files beside it, and generation defaults that transformers reads but does not save."""
    path = tmp_path_factory.mktemp("models") / "llama"
    make_peer("llama").save_pretrained(path)
    (path / "tokenizer.json").write_text('{"any": "tokenizer"}')
    (path / "generation_config.json").write_text(
        json.dumps({"temperature": 0.5, "do_sample": False, "bos_token_id": 1})
    )
    (path / "notes.txt").write_text("not to be copied")
    return path


def test_the_model_is_written_whole_with_what_goes_with_it(folder, tmp_path, capsys) -> None:
    out = tmp_path / "new" / "hybrid"
    assert main(["convert", str(folder), "--out", str(out), "--check"]) == 0
    assert sorted(path.name for path in out.iterdir()) == [
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    assert [path.name for path in out.parent.iterdir()] == ["hybrid"]
    for name in ("generation_config.json", "tokenizer.json"):
        assert (out / name).read_bytes() == (folder / name).read_bytes()
    model = HybridForCausalLM.from_pretrained(out)
    ids = torch.arange(2, VOCABULARY).unsqueeze(0)
    assert torch.equal(model(ids).logits, from_transformers(folder)(ids).logits)
    printed = capsys.readouterr().out
    assert "largest logit difference from transformers: " in printed
    assert "copied: tokenizer.json, generation_config.json" in printed
    assert printed.endswith(f"{out}\n")


def test_without_generation_defaults_those_of_the_config_are_written(folder, tmp_path) -> None:
    source = tmp_path / "source"
    shutil.copytree(folder, source)
    (source / "generation_config.json").unlink()
    assert main(["convert", str(source), "--out", str(tmp_path / "out")]) == 0
    defaults = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert (defaults["bos_token_id"], defaults["pad_token_id"]) == (1, 0)


def test_layers_are_replaced_as_by_the_function_and_the_dtype_is_chosen(folder, tmp_path, capsys) -> None:
    options = ["--replace-layers", "every:2", "--calibration-steps", "2", "--seed", "3", "--dtype", "float64"]
    assert main(["convert", str(folder), "--out", str(tmp_path / "hybrid"), *options]) == 0
    printed = capsys.readouterr().out
    assert "layer 1: relative squared error of the mixer " in printed
    rows = [line.split() for line in printed.splitlines()]
    assert ["attention", "3", "2"] in rows
    assert ["mamba2", "0", "1"] in rows
    wide = from_transformers(folder, dtype=torch.float64)
    expected = convert_to_hybrid(wide, [1], calibration_steps=2, seed=3).state_dict()
    saved = HybridForCausalLM.from_pretrained(tmp_path / "hybrid")
    assert saved.dtype == torch.float64
    assert all(torch.equal(tensor, expected[name]) for name, tensor in saved.state_dict().items())

    assert main(["convert", str(tmp_path / "hybrid"), "--out", str(tmp_path / "on"), "--replace-layers", "0"]) == 0
    assert HybridForCausalLM.from_pretrained(tmp_path / "on").config.mixers == ["mamba2", "mamba2", "attention"]


def test_layers_are_named_by_number_or_by_step() -> None:
    mixers = ["attention", "mamba", "sliding_attention", "attention", "attention"]
    assert chosen_layers("1,3,5", mixers) == [1, 3, 5]
    assert chosen_layers("every:2", mixers) == [2, 4]
    assert chosen_layers("every:1", mixers) == [0, 2, 3, 4]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--replace-layers", "1,x"], "--replace-layers 1,x must be numbers, as in 1,3,5, or every:2"),
        (["--replace-layers", "every:0"], "--replace-layers every:0 needs a positive number"),
        (["--replace-layers", "every:9"], "--replace-layers every:9 names no layer: the model has 3 with attention"),
        (["--replace-layers", "3"], "layer 3 is out of range: the model has layers 0 to 2"),
        (["--replace-layers", "1", "--mixer", "mamba"], "mixer='mamba' is not supported"),
        (["--calibration-steps", "-1"], "--calibration-steps -1 must not be negative"),
        (["--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
    ],
)
def test_bad_input_is_told_in_one_line_and_nothing_is_written(options, message, folder, tmp_path, capsys) -> None:
    assert main(["convert", str(folder), "--out", str(tmp_path / "out"), *options]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"neural-layers: {message}")
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_folders_that_do_not_serve_are_named(folder, tmp_path, capsys) -> None:
    def refused(*arguments: str) -> str:
        assert main(["convert", *arguments]) == 2
        return capsys.readouterr().err

    assert "is not an empty folder; give a new one to --out" in refused(str(folder), "--out", str(folder))
    assert "nowhere is no folder" in refused(str(tmp_path / "nowhere"), "--out", str(tmp_path / "out"))
    assert main(["convert", str(folder), "--out", str(tmp_path / "hybrid")]) == 0
    capsys.readouterr()
    assert "holds a hybrid model" in refused(str(tmp_path / "hybrid"), "--out", str(tmp_path / "out"), "--check")


def test_a_model_that_differs_from_transformers_is_not_written(folder, tmp_path, capsys, monkeypatch) -> None:
    monkeypatch.setattr("neural_layers.models.conversion.folder.logit_difference", lambda folder: (1.0, 3.0))
    assert main(["convert", str(folder), "--out", str(tmp_path / "out"), "--check"]) == 1
    assert "nothing was written" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


def test_what_breaks_while_saving_leaves_nothing_behind(folder, tmp_path, capsys, monkeypatch) -> None:
    def fail(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(HybridForCausalLM, "save_pretrained", fail)
    assert main(["convert", str(folder), "--out", str(tmp_path / "out")]) == 1
    assert "No space left on device" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
