"""`neural-layers lora train|merge|inspect` on a tiny model."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("transformers", reason="the command trains transformers models")
pytest.importorskip("accelerate", reason="the command trains with transformers' Trainer")

from neural_layers.cli import main
from neural_layers.distill.text.tokenizing import character_tokenizer
from neural_layers.models.hybrid import HybridConfig, HybridForCausalLM
from neural_layers.models.loading import load_language_model
from neural_layers.wrappers.lora import load_adapter

TEXT = "the quick brown fox jumps over the lazy dog; " * 60


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A model's folder and a text of which it does not know one character."""
    folder = tmp_path_factory.mktemp("base")
    tokenizer = character_tokenizer([TEXT])
    torch.manual_seed(0)
    config = HybridConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=24, num_hidden_layers=2,
        mixers=["mamba", "attention"], num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=32,
        mamba_dt_rank=4, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    HybridForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    (folder / "text.txt").write_text(TEXT + "#")
    return folder


def train(base, out, *more, steps=4):
    return [
        "lora", "train", str(base / "model"), "--data", str(base / "text.txt"), "--valid-fraction", "0.2",
        "--context", "16", "--batch", "2", "--steps", str(steps), "--eval-steps", "2", "--save-steps", "2",
        "--out", str(out), "--cache", str(base / "cache"), "--report-to", "none", "--r", "2", *more,
    ]  # fmt: skip


QLORA = ("--quantize", "nf4", "--double-quant", "--dora", "--targets", "re:.*_proj,conv1d", "--rank", "x_proj=1")


def test_an_adapter_is_trained_resumed_to_the_same_bits_inspected_and_merged(base, tmp_path, capsys) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert main(train(base, whole, *QLORA)) == 0
    told = capsys.readouterr().out
    assert "perplexity" in told
    assert f"adapter: {whole / 'adapter'}" in told
    report = json.loads((whole / "report.json").read_text())
    assert report["before"]["loss"] > report["validation"]["loss"]
    assert report["trainable"] == sum(
        t.numel() for t in load_file(whole / "adapter/adapter_model.safetensors").values()
    )
    assert 0 < report["share"] == report["trainable"] / report["base_and_adapter"]
    assert report["peak_memory_mib"] > 0

    # As a killed run leaves it: a checkpoint in the middle, no result.
    shutil.copytree(whole, cut)
    for path in (cut / "adapter", cut / "checkpoints/checkpoint-4"):
        shutil.rmtree(path)
    (cut / "report.json").unlink()
    assert main(train(base, cut, *QLORA)) == 0
    one, other = (load_file(folder / "adapter/adapter_model.safetensors") for folder in (whole, cut))
    assert one.keys() == other.keys()
    assert all(torch.equal(one[key], other[key]) for key in one)
    assert "inner.q_proj.adapters" in str(load_file(cut / "checkpoints/checkpoint-4/model.safetensors").keys())
    assert not any("base_layer" in key for key in load_file(cut / "checkpoints/checkpoint-4/model.safetensors"))

    capsys.readouterr()
    assert main(["lora", "inspect", str(whole / "adapter")]) == 0
    told = capsys.readouterr().out
    assert "model.layers.*.mixer.inner.q_proj.lora_A.weight" in told
    assert "r=2, lora_alpha=16" in told
    assert main(["lora", "inspect", str(whole / "adapter"), "--r", "4"]) == 2
    assert "--r is for a model's folder" in capsys.readouterr().err
    assert main(["lora", "inspect", str(base / "model"), "--targets", "conv1d", "--r", "3"]) == 0
    assert "conv1d  CausalConv1d  4 → 32" in capsys.readouterr().out

    merged = tmp_path / "merged"
    assert main(["lora", "merge", str(base / "model"), str(whole / "adapter"), "--out", str(merged)]) == 0
    assert "Linear: " in capsys.readouterr().out
    model, tokenizer = load_language_model(merged)
    ids = torch.tensor([tokenizer("the lazy fox")["input_ids"]])
    expected = load_language_model(base / "model")[0]
    load_adapter(expected, whole / "adapter")
    torch.testing.assert_close(model(ids).logits, expected(ids).logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--targets", "q_prj"), "'q_prj' matches no module; the nearest are"),
        (("--targets", "conv1d", "--r", "5"), "r=5 is above the rank 4"),
        (("--targets", "re:("), "not a regular expression"),
        (("--r", "0"), "r=0 must be a whole number"),
        (("--quantize", "int3"), "--quantize int3 must be one of nf4"),
        (("--double-quant",), "--double-quant is for --quantize nf4"),
        (("--rank", "x_proj"), "--rank 'x_proj' must be PATTERN=R"),
        (("--layers", "a"), "--layers 'a' is no index"),
        (("--layers", "5"), "layers=5 has no module"),
        (("--context", "64"), "--context 64 is longer than the 32 tokens"),
    ],
)
def test_bad_input_of_a_training_is_answered_in_one_line(arguments, message, base, tmp_path, capsys) -> None:
    assert main(train(base, tmp_path / "run", *arguments)) == 2
    error = capsys.readouterr().err
    assert message in error.splitlines()[-1]


def test_bad_input_of_merge_and_inspect_is_answered_in_one_line(base, tmp_path, capsys) -> None:
    empty, full = tmp_path / "empty", tmp_path / "full"
    empty.mkdir()
    full.mkdir()
    (full / "x").touch()
    model = str(base / "model")
    for arguments, message in (
        (["merge", model, str(empty), "--out", str(tmp_path / "m")], "holds no adapter_model.safetensors"),
        (["merge", model, model, "--out", str(full)], "exists and nothing in it is overwritten"),
        (["merge", model, model, "--out", str(tmp_path / "m"), "--quantize", "x"], "--quantize x must be one of"),
        (["inspect", str(empty)], "holds no config.json"),
        (["inspect", str(tmp_path / "none")], "there is no folder"),
    ):
        assert main(["lora", *arguments]) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "m").exists()
