"""`neural-layers quantize`: what it writes and prints for each kind of model, and what it answers to bad input."""

import json
import shutil

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

from safetensors.torch import load_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import (
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
)

from neural_layers.cli import main
from neural_layers.models.cvm import CVMConfig, CVMForConditionalGeneration
from neural_layers.models.hybrid import HybridConfig, HybridForCausalLM
from neural_layers.wrappers.quantization import Plan, load_quantized, quantize

SIZES = {"vocab_size": 259, "hidden_size": 64, "intermediate_size": 64, "max_position_embeddings": 64}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 1}


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte, behind the three special ones; the end behind each text."""
    alphabet = ["<pad>", "<s>", "</s>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE(vocab={text: i for i, text in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def make_models() -> dict[str, torch.nn.Module]:
    torch.manual_seed(0)
    classifier = Qwen2Config(
        **SIZES, **HEADS, num_hidden_layers=1, pad_token_id=0, num_labels=2,
        id2label={0: "good", 1: "bad"}, label2id={"good": 0, "bad": 1},
    )  # fmt: skip
    return {
        "translator": CVMForConditionalGeneration(CVMConfig(**SIZES, num_hidden_layers=1, num_attention_heads=2)),
        "hybrid": HybridForCausalLM(HybridConfig(**SIZES, **HEADS, mixers=["mamba", "attention"], num_hidden_layers=2)),
        "classifier": Qwen2ForSequenceClassification(classifier),
        # Its tokenizer adds a token.
        "qwen": Qwen2ForCausalLM(Qwen2Config(**SIZES | {"vocab_size": 264}, **HEADS, num_hidden_layers=1)),
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The models' folders and their data."""
    folder = tmp_path_factory.mktemp("quantize")
    for name, model in make_models().items():
        model.save_pretrained(folder / name)
        make_tokenizer().save_pretrained(folder / name)
    (folder / "pairs.tsv").write_text("".join(f"word {i}\tWort {i}\n" for i in range(6)))
    (folder / "text.txt").write_text("the quick fox and the lazy dog ran. " * 8)
    rows = [{"text": f"it was {word}", "label": word} for word in ("good", "bad", "good")]
    (folder / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def run(folder, tmp_path, capsys):
    """Runs the command on a model; returns the status, what was printed and the folder that was written."""

    def run(model: str, data: str, *arguments: object):
        out = tmp_path / "out"
        given = [str(folder / model), "--data", str(folder / data), "--out", str(out), "--rounds", "1", "--batch", "2"]
        status = main(["quantize", *given, "--cache", str(tmp_path / "cache"), *map(str, arguments)])
        captured = capsys.readouterr()
        return status, captured.out if status == 0 else captured.err, out

    return run


@pytest.mark.parametrize(
    ("name", "data", "metrics"),
    [
        ("translator", "pairs.tsv", ("bleu", "chrf")),
        ("hybrid", "text.txt", ("loss", "perplexity")),
        ("classifier", "texts.jsonl", ("accuracy", "macro_f1")),
        ("qwen", "text.txt", ("loss", "perplexity")),
    ],
)
def test_each_kind_of_model_is_written_with_its_table(name, data, metrics, run, folder) -> None:
    status, printed, out = run(name, data, "--scheme", "int8_dynamic", "--limit", 2, "--context", 16)
    assert status == 0, printed
    sizes = json.loads((out / "sizes.json").read_text())
    before, after = sizes["rows"]
    assert (before["name"], after["name"]) == ("float32", "int8_dynamic")
    assert tuple(after["quality"]) == metrics
    assert after["ratio"] > 2.5
    assert 0 < after["error"] < 0.1
    assert after["file_bytes"] == pytest.approx((out / "model.safetensors").stat().st_size, abs=2000)
    assert "int8_dynamic" in printed
    assert str(out / "model.safetensors") in printed
    expected = make_models()[name].eval()
    quantize(expected, "int8_dynamic")
    found = type(expected).from_pretrained(out).eval()
    assert Plan.of(found) == Plan.of(expected)
    batch = {"input_ids": torch.tensor([[5, 7, 9]])}
    if name == "translator":
        batch["decoder_input_ids"] = batch["input_ids"]
    with torch.no_grad():
        assert torch.equal(found(**batch).logits, expected(**batch).logits)
    assert (out / "tokenizer.json").read_bytes() == (folder / name / "tokenizer.json").read_bytes()


def test_options_of_the_bits_reach_the_layers(run) -> None:
    status, printed, out = run(
        "hybrid", "text.txt", "--scheme", "nf4", "--double-quant", "--block-size", 128, "--exclude", "in_proj",
        "--no-embeddings", "--context", 16, "--limit", 1,
    )  # fmt: skip
    assert status == 0, printed
    layers = json.loads((out / "quantization.json").read_text())["layers"]
    assert all(entry == {"scheme": "nf4", "block_size": 128, "double_quant": True} for entry in layers.values())
    assert not any(name.endswith(("in_proj", "embed_tokens", "lm_head")) for name in layers)
    assert "nf4 double" in printed


def test_static_scales_are_those_of_the_calibration_data(run, folder) -> None:
    arguments = ("--scheme", "int8_static", "--context", 16, "--limit", 1, "--calibration-rows", 3)
    status, printed, out = run("hybrid", "text.txt", *arguments, "--calibration", folder / "text.txt")
    assert status == 0, printed
    scales = [value for name, value in load_file(out / "model.safetensors").items() if name.endswith("input_scale")]
    assert scales
    assert len({float(scale) for scale in scales}) > 1


def test_a_progressive_run_writes_a_plan_that_replays_and_a_picture(run, folder) -> None:
    status, printed, out = run(
        "hybrid", "text.txt", "--progressive", "--target-mb", 0.08, "--ladder", "int8,nf4", "--chunks", 2,
        "--calibration", folder / "text.txt", "--context", 16, "--limit", 1, "--calibration-rows", 2,
    )  # fmt: skip
    assert status == 0, printed
    content = json.loads((out / "progressive.json").read_text())
    assert content["result"]["bytes"] <= 80_000
    assert [row["name"] for row in json.loads((out / "sizes.json").read_text())["rows"]] == [
        "float32", "int8", "nf4", "progressive",
    ]  # fmt: skip
    assert (out / "progressive.png").read_bytes()[:4] == b"\x89PNG"
    replayed = make_models()["hybrid"].eval()
    quantize(replayed, Plan(content["plan"]["layers"]))
    loaded = load_quantized(out)
    for name, tensor in replayed.state_dict().items():
        assert torch.equal(tensor, loaded.state_dict()[name]), name
    assert "the target is reached" in printed


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        ("hybrid", [], "give --scheme NAME, or --progressive"),
        ("hybrid", ["--scheme", "nf4", "--progressive"], "give --scheme NAME, or --progressive"),
        ("hybrid", ["--scheme", "int3"], "invalid choice: 'int3'"),
        ("hybrid", ["--scheme", "int8_static"], "--scheme int8_static needs --calibration"),
        ("hybrid", ["--progressive"], "--progressive needs --calibration"),
        ("hybrid", ["--scheme", "nf4", "--calibration", "x.txt"], "--scheme nf4 takes no --calibration; leave it out"),
        ("hybrid", ["--scheme", "nf4", "--floor", "0.9"], "--floor and --target-mb belong to --progressive"),
        ("hybrid", ["--progressive", "--double-quant", "--calibration", "x.txt"], "belong to --scheme"),
        ("hybrid", ["--scheme", "int4", "--double-quant"], "double_quant=True: 'int4' has no scales to quantize"),
        ("hybrid", ["--scheme", "nf4", "--exclude", "q_prj"], "the pattern 'q_prj' matches no module; the nearest"),
        ("hybrid", ["--scheme", "nf4", "--context", "1000"], "--context 1000 must lie between 2 and 64"),
        ("hybrid", ["--scheme", "nf4", "--rounds", "0"], "--rounds 0 must be at least 1"),
        ("hybrid", ["--scheme", "nf4", "--ladder", "bf16"], "--ladder belongs to --progressive"),
        ("hybrid", ["--scheme", "nf4", "--chunks", "3"], "--chunks belongs to --progressive"),
        ("hybrid", ["--scheme", "nf4", "--calibration-rows", "3"], "--calibration-rows belongs to --calibration"),
        ("hybrid", ["--scheme", "nf4", "--limit", "0"], "--limit 0 must be at least 1"),
        ("hybrid", ["--scheme", "nf4", "--threads", "0"], "--threads 0 must be at least 1"),
        ("nowhere", ["--scheme", "nf4"], "there is no folder"),
        ("done", ["--scheme", "nf4"], "is quantized already; give the float model"),
        ("other", ["--scheme", "nf4"], "holds a BertForMaskedLM; quantize takes CVM translators"),
    ],
)
def test_bad_input_is_answered_in_one_line_and_nothing_is_written(model, arguments, message, run, folder) -> None:
    for name, changes in (("done", {"quantization_config": {}}), ("other", {"architectures": ["BertForMaskedLM"]})):
        if model == name and not (folder / name).exists():
            shutil.copytree(folder / "qwen", folder / name)
            config = json.loads((folder / name / "config.json").read_text())
            changes = {"quantization_config": {"quant_method": "neural_layers"}} if name == "done" else changes
            (folder / name / "config.json").write_text(json.dumps({**config, **changes}))
    status, printed, out = run(model, "text.txt", *arguments)
    assert status == 2
    assert message in printed
    assert printed.count("\n") == 1
    assert not out.exists()


def test_data_that_cannot_be_read_and_a_folder_that_is_taken(run, folder, tmp_path) -> None:
    status, printed, _ = run("translator", "text.txt", "--scheme", "nf4")
    assert (status, printed.count("\n")) == (2, 1)
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "kept.txt").write_text("kept")
    status, printed, out = run("hybrid", "text.txt", "--scheme", "nf4")
    assert status == 2
    assert "is there already; give a new folder" in printed
    assert [path.name for path in out.iterdir()] == ["kept.txt"]
