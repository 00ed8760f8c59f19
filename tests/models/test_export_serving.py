"""Serving exported folders: the tokens of PyTorch's generate, text in pieces, errors that a person can mend."""

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from neural_layers import cli
from neural_layers.errors import InputError
from neural_layers.models.cvm import CVMConfig, CVMForConditionalGeneration
from neural_layers.models.export import OnnxModel, OnnxTranslator, VerificationError, export_onnx
from neural_layers.models.export import cvm as cvm_graph
from neural_layers.models.export import session as session_file
from neural_layers.models.export.pages import large_pages
from neural_layers.models.export.sampling import GenerationOptions, choose
from neural_layers.models.export.stepper import Stepper
from neural_layers.models.export.text import TextPieces
from neural_layers.models.hybrid import HybridForCausalLM
from neural_layers.wrappers.quantization import quantize
from tests.models.test_export import build

EOS = 3


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """A token for each byte."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={character: i for i, character in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved model with a tokenizer, and its export below."""
    saved = tmp_path_factory.mktemp("model")
    model = build(vocab_size=256, sliding_window=7, eos_token_id=EOS, pad_token_id=0, max_position_embeddings=128)
    model.save_pretrained(saved)
    byte_tokenizer().save_pretrained(saved)
    export_onnx(HybridForCausalLM.from_pretrained(saved), saved / "onnx", verify=False)
    return saved


@pytest.fixture(scope="module")
def model(folder: Path) -> HybridForCausalLM:
    return HybridForCausalLM.from_pretrained(folder).eval()


@pytest.fixture(scope="module")
def served(folder: Path) -> OnnxModel:
    return OnnxModel(folder / "onnx", threads=1)


WAYS: dict[str, dict[str, Any]] = {
    "greedy": {"eos_token_id": None},
    "until the end of each row": {"eos_token_id": [3, *range(60, 90)]},
    "penalty and no repeats": {"repetition_penalty": 1.4, "no_repeat_ngram_size": 2},
    "at least so many": {"eos_token_id": list(range(200)), "min_new_tokens": 6},
}


@pytest.mark.parametrize("way", WAYS)
def test_greedy_tokens_are_those_of_pytorch(way: str, model: HybridForCausalLM, served: OnnxModel) -> None:
    ids = torch.randint(4, 256, (3, 11), generator=torch.Generator().manual_seed(5))
    mask = torch.ones_like(ids)
    mask[1, :4] = ids[1, :4] = 0
    wanted = model.generate(ids, attention_mask=mask, max_new_tokens=30, do_sample=False, pad_token_id=0, **WAYS[way])
    found = served.generate(ids, mask, max_new_tokens=30, pad_token_id=0, **WAYS[way])
    np.testing.assert_array_equal(found, wanted.numpy())


def test_rows_of_different_lengths_are_padded_on_the_left(served: OnnxModel) -> None:
    rows = [[7, 8, 9, 10], [5]]
    both = served.generate(rows, max_new_tokens=6)
    for row, made in zip(rows, both, strict=True):
        alone = served.generate(row, max_new_tokens=6)[0]
        np.testing.assert_array_equal(made[4:][: len(alone) - len(row)], alone[len(row) :])


def test_long_prompts_are_read_in_chunks(served: OnnxModel, monkeypatch: Any) -> None:
    ids = np.arange(4, 54)[None]
    whole = served.generate(ids, max_new_tokens=5)
    monkeypatch.setattr("neural_layers.models.export.onnx_model.PREFILL", 16)
    np.testing.assert_array_equal(served.generate(ids, max_new_tokens=5), whole)


def test_steps_of_one_decoding_leave_the_state_that_it_began_with(served: OnnxModel) -> None:
    _, state = served.forward([[9, 8, 7]])
    before = state.numpy()
    first, second = Stepper(served.session, state), Stepper(served.session, state)
    logits = [first(np.array([[token]])).copy() for token in (5, 6, 7)]
    for name, value in state.numpy().items():
        np.testing.assert_array_equal(value, before[name])
    for token, wanted in zip((5, 6, 7), logits, strict=True):
        np.testing.assert_array_equal(second(np.array([[token]])), wanted)


def test_large_pages_hold_what_was_written_and_their_absence_is_no_error(monkeypatch: Any) -> None:
    with large_pages():
        values = np.arange(3 << 20)
    assert (values == np.arange(3 << 20)).all()
    monkeypatch.setattr("neural_layers.models.export.pages.Path", lambda name: Path("/nowhere"))
    with large_pages():
        assert np.ones(3 << 20).sum() == 3 << 20
    with pytest.raises(InputError), large_pages():
        raise InputError("what fails in the block is told")


def test_text_is_what_the_stream_gives_in_pieces(model: HybridForCausalLM, served: OnnxModel) -> None:
    options: dict[str, Any] = {"max_new_tokens": 40, "do_sample": True, "seed": 11, "temperature": 0.9}
    text = served.generate("Grüße", **options)
    pieces = list(served.stream("Grüße", **options))
    assert "".join(pieces) == text
    assert len(pieces) > 5
    assert served.generate(["Grüße"], **options) == [text]
    greedy = model.generate(torch.tensor([served.tokenizer.encode("ab").ids]), max_new_tokens=9, do_sample=False)
    assert served.generate("ab", max_new_tokens=9) == served.tokenizer.decode(greedy[0, 2:].tolist())


def test_a_mask_counts_for_text_as_it_does_for_ids(served: OnnxModel) -> None:
    kept = {"max_new_tokens": 12, "eos_token_id": None}
    assert served.generate("zab", [0, 1, 1], **kept) == served.generate("ab", **kept) != served.generate("zab", **kept)
    assert served.generate(["zab"], attention_mask=np.array([[0, 1, 1]]), **kept) == [served.generate("ab", **kept)]
    ids = [list(b"zab"), list(b"xyz")]
    mask = [[0, 1, 1], [1, 1, 1]]
    rows = served.generate([[*row] for row in ids], mask, **kept)
    np.testing.assert_array_equal(rows[0, 3:], served.generate(ids[0][1:], **kept)[0, 2:])


def test_a_stop_string_ends_the_text_before_it(served: OnnxModel) -> None:
    options: dict[str, Any] = {"max_new_tokens": 60, "do_sample": True, "seed": 2, "eos_token_id": None}
    text = served.generate("x", **options)
    stop = text[20:23]
    cut = text[: text.index(stop)]
    assert served.generate("x", stop_strings=[stop, "never"], **options) == cut
    assert "".join(served.stream("x", stop_strings=stop, **options)) == cut


def test_pieces_wait_for_whole_characters_and_for_what_may_be_a_stop_string() -> None:
    tokenizer = byte_tokenizer()
    pieces = TextPieces(tokenizer, ["<end>"])
    taken = []
    for token in tokenizer("aé<en<end>z")["input_ids"]:
        if not pieces.stopped:
            pieces.push(token)
            taken.append(pieces.take())
    pieces.end()
    assert taken == ["a", "", "é", "", "", "", "<en", "", "", "", ""]
    assert pieces.stopped
    assert pieces.take() == ""


def test_sampling_keeps_to_its_limits_and_to_its_distribution() -> None:
    logits = np.log(np.array([[0.4, 0.3, 0.2, 0.06, 0.04]], np.float32))
    random = np.random.default_rng(0)

    def shares(**options: Any) -> np.ndarray:
        chosen = GenerationOptions(do_sample=True, **options)
        rows = np.repeat(logits, 20000, axis=0)
        tokens = choose(rows, np.zeros((20000, 1), int), 0, chosen, random)
        return np.bincount(tokens, minlength=5) / 20000

    assert np.abs(shares() - [0.4, 0.3, 0.2, 0.06, 0.04]).max() < 0.02
    assert np.abs(shares(top_k=2) - [4 / 7, 3 / 7, 0, 0, 0]).max() < 0.02
    assert np.abs(shares(top_p=0.65) - [4 / 7, 3 / 7, 0, 0, 0]).max() < 0.02
    assert np.abs(shares(min_p=0.4) - np.array([4, 3, 2, 0, 0]) / 9).max() < 0.02
    assert shares(temperature=0.05)[0] > 0.99
    assert shares(typical_p=0.2).max() == 1


def test_a_temperature_is_never_ignored_and_defaults_are_those_of_the_folder() -> None:
    resolve = GenerationOptions.resolve
    assert resolve({}, {"temperature": 0.8}).do_sample
    assert not resolve({"temperature": 0.8}, {}).do_sample
    assert not resolve({"do_sample": True}, {"do_sample": False, "top_k": 3}).do_sample
    assert resolve({"do_sample": True, "top_p": 0.3, "max_new_tokens": None}, {"top_k": 7}) == GenerationOptions(
        do_sample=True, top_p=0.3, top_k=7
    )


@pytest.mark.parametrize("options", [{"top_k": 3}, {"top_p": 0.7}, {"min_p": 0.2}, {"typical_p": 0.5}, {"top_p": 0.1}])
def test_what_the_limits_leave_is_what_transformers_leaves(options: dict[str, float]) -> None:
    from transformers import LogitsProcessorList
    from transformers.generation import logits_process as peers

    from neural_layers.models.export.sampling import _warp

    kinds = {
        "top_k": peers.TopKLogitsWarper, "top_p": peers.TopPLogitsWarper,
        "min_p": peers.MinPLogitsWarper, "typical_p": peers.TypicalLogitsWarper,
    }  # fmt: skip
    logits = torch.randn(4, 40, generator=torch.Generator().manual_seed(0)) * 2
    warpers = LogitsProcessorList([kinds[name](value) for name, value in options.items()])
    wanted = warpers(torch.zeros(4, 1, dtype=torch.long), logits.clone()).isfinite().numpy()
    found = np.isfinite(_warp(logits.numpy(), GenerationOptions(do_sample=True, **{"top_k": 0, **options})))
    np.testing.assert_array_equal(found, wanted)


def test_a_folder_serves_without_transformers_onnx_or_training_extras(folder: Path) -> None:
    code = (
        "import sys\n"
        "blocked = ('transformers', 'accelerate', 'datasets', 'onnx', 'safetensors', 'rich', 'triton')\n"
        "sys.modules |= dict.fromkeys(blocked)\n"
        "from neural_layers.models.export import OnnxModel\n"
        f"model = OnnxModel({str(folder / 'onnx')!r}, threads=1)\n"
        "print(len(model.generate('hello', max_new_tokens=4, eos_token_id=[])) > 0, *model.generate([5, 6]).shape)"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split()[0] == "True"


def test_a_missing_package_is_an_error_that_names_the_extra(folder: Path) -> None:
    code = (
        "import sys\nsys.modules |= dict.fromkeys(('onnxruntime', 'onnx'))\n"
        "import neural_layers.models.export as export\n"
        "for name in ('OnnxModel', 'export_onnx'):\n"
        "    try:\n        getattr(export, name)\n    except ImportError as error:\n        print(error)"
    )
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True)
    assert done.stdout.count("pip install 'neural-layers[onnx]'") == 2


def test_bad_input_is_an_error_with_value_and_remedy(served: OnnxModel) -> None:
    _, state = served.forward([[4, 5]])
    other = type(state)(state.mask, {**state.tensors, "past.0.conv": state.tensors["past.2.keys"]})
    cases: list[tuple[Any, str]] = [
        (
            lambda: served.forward([[1]], state=other),
            r"the state is of another model: its past.0.conv is \[1, 4, 2, 16\]",
        ),
        (lambda: served.generate(), "generate needs a prompt"),
        (lambda: served.generate([]), "prompt 0 is empty; give at least one token"),
        (lambda: served.generate(""), "prompt 0 is empty"),
        (lambda: served.generate([[1], []]), "prompt 1 is empty"),
        (lambda: served.generate([256]), "token id 256 lies outside the vocabulary of 256"),
        (lambda: served.generate([-1]), "token id -1 lies outside"),
        (lambda: served.generate([1] * 120, max_new_tokens=9), "120 tokens of the prompt and 9 new ones are more than"),
        (lambda: served.forward([1] * 129), "129 tokens are more than the context of 128"),
        (lambda: served.forward([[1], [2]], state=state), "the state is of 1 rows, and input_ids has 2"),
        (lambda: served.forward([1, 2], [1]), r"attention_mask has shape \(1, 1\); expected that of the ids, \(1, 2\)"),
        (lambda: served.generate("ab", attention_mask=[1]), r"attention_mask has shape \(1, 1\); expected .* \(1, 2\)"),
        (lambda: served.generate(["a", "bc"], [[1, 1]] * 2), "mask is for rows of one length, not 1 and 2"),
        (lambda: served.generate([[1], [2, 3]], [[1, 1]] * 2), "mask is for rows of one length, not 1 and 2"),
        (lambda: served.forward([1, 2], keep=3), "keep=3 must be from 1 to the 2 tokens"),
        (lambda: served.generate([1], num_beams=4), "num_beams=4: an exported model decodes one beam"),
        (lambda: served.generate([1], tempeature=1), "generate does not know tempeature; it takes max_new_tokens"),
        (lambda: served.generate([1], temperature=0.0), "temperature=0.0 must be above 0"),
        (lambda: served.generate([1], top_p=1.5), r"top_p=1.5 must be in \(0, 1\]"),
        (lambda: served.generate([1, 2], max_length=2), "max_length=2 leaves nothing after a prompt of 2 tokens"),
        (lambda: served.stream([[1], [2]]), "stream takes one prompt, not 2"),
        (lambda: OnnxModel(served.folder, threads=0), "threads=0 must be at least 1"),
    ]
    for run, message in cases:
        with pytest.raises(InputError, match=message):
            run()


def test_folders_that_are_not_an_export_are_refused(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=f"there is no model.onnx in {tmp_path}; export a model there"):
        OnnxModel(tmp_path)
    shutil.copytree(folder / "onnx", tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    (tmp_path / "other" / "config.json").write_text(json.dumps({**config, "vocab_size": 99}))
    with pytest.raises(InputError, match="says vocab_size=99, and the graph was exported with vocab_size=256"):
        OnnxModel(tmp_path / "other")
    (tmp_path / "other" / "config.json").write_text("{")
    with pytest.raises(InputError, match="config.json is not JSON"):
        OnnxModel(tmp_path / "other")
    (tmp_path / "other" / "model.onnx").write_bytes(b"torn")
    with pytest.raises(InputError, match="is not a model that ONNX Runtime .* reads"):
        OnnxModel(tmp_path / "other")
    (folder / "onnx" / "tokenizer.json").rename(tmp_path / "tokenizer.json")
    try:
        with pytest.raises(InputError, match="there is no tokenizer.json in"):
            OnnxModel(folder / "onnx").generate("text")
    finally:
        (tmp_path / "tokenizer.json").rename(folder / "onnx" / "tokenizer.json")


def test_a_tokenizer_that_does_not_match_the_model_is_refused(folder: Path, tmp_path: Path) -> None:
    larger = byte_tokenizer()
    larger.add_tokens(["<more>"])
    with pytest.raises(InputError, match="the tokenizer has 257 tokens and the model 256; give the model's own"):
        export_onnx(HybridForCausalLM.from_pretrained(folder), tmp_path / "out", tokenizer=larger, verify=False)
    with pytest.raises(InputError, match=f"there is no tokenizer.json in {tmp_path}"):
        export_onnx(HybridForCausalLM.from_pretrained(folder), tmp_path / "out", tokenizer=tmp_path, verify=False)
    assert not (tmp_path / "out").exists()
    shutil.copytree(folder / "onnx", tmp_path / "torn")
    (tmp_path / "torn" / "tokenizer.json").write_text("{}")
    with pytest.raises(InputError, match=r"tokenizer.json cannot be read: .*; export the model again"):
        OnnxModel(tmp_path / "torn").generate("a")


def build_translator(**overrides: Any) -> CVMForConditionalGeneration:
    torch.manual_seed(0)
    sizes = {"vocab_size": 80, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    layers = {"num_hidden_layers": 2, "num_decoder_layers": 3, "num_key_value_heads": 2}
    model = CVMForConditionalGeneration(CVMConfig(**{**sizes, **layers, "max_position_embeddings": 140, **overrides}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


@pytest.mark.parametrize("overrides", [{}, {"count_vector_merge": False, "tie_word_embeddings": False}])
def test_a_translator_gives_the_tokens_of_pytorch(overrides: dict[str, bool], tmp_path: Path) -> None:
    model = build_translator(**overrides)
    checks = export_onnx(model, tmp_path)
    assert {1, 2, 63, 64, 65, 128} <= {check.length for check in checks}
    assert max(check.error for check in checks) < 2e-5
    served = OnnxTranslator(tmp_path, threads=1)
    ids = torch.randint(3, 80, (3, 12))
    ids[1, 5:] = ids[2, 9:] = 0
    wanted = model.generate(ids, attention_mask=(ids != 0).long(), max_new_tokens=25, do_sample=False)
    np.testing.assert_array_equal(served.generate(ids, max_new_tokens=25), wanted.numpy())
    rows = [row[row != 0].tolist() for row in ids]
    np.testing.assert_array_equal(served.generate(rows, max_new_tokens=25), wanted.numpy())
    for bits in ("int8", "int4"):
        assert export_onnx(model, tmp_path / bits, quantize=bits)
    with pytest.raises(InputError, match="a source of 141 tokens is longer than the context of 140; split it"):
        served.generate([5] * 141)
    with pytest.raises(InputError, match="there is no model.onnx"):
        OnnxModel(tmp_path)


def test_a_wrong_translator_is_found(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(cvm_graph, "_merge", lambda g, weights, merge, x, *rest: x)
    with pytest.raises(VerificationError, match="the source's keys for layer 0 differs"):
        export_onnx(build_translator(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_exports_and_tells_what_was_verified(folder: Path, tmp_path: Path, capsys: Any) -> None:
    arguments = ["export", str(folder), "--out", str(tmp_path / "out"), "--quantize", "int4", "--rounds", "2"]
    assert cli.main(arguments) == 0
    printed = capsys.readouterr().out
    assert "HybridForCausalLM, opset 23, int4" in printed
    lines = [line.split() for line in printed.splitlines()]
    assert [line[0] for line in lines if line and line[0].isdigit()] == ["1", "2", "10", "63", "64", "65", "121"]
    assert f"MB  {tmp_path / 'out' / 'model.onnx'}" in printed
    assert isinstance(OnnxModel(tmp_path / "out").generate("a", max_new_tokens=2), str)
    forms = [line for line in printed.splitlines() if line.startswith(("PyTorch", "ONNX"))]
    assert [" ".join(form.split()[:2]) for form in forms] == ["PyTorch float32", "ONNX float32", "ONNX int4"]
    ratios = [float(form.split()[3]) for form in forms]
    assert ratios[0] == 1
    assert ratios[2] > 2 * ratios[1]


def test_the_command_calibrates_on_a_file_and_exports_quantized_folders(
    folder: Path, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "text.txt").write_text("What is read when it serves. " * 20)
    out = ["--out", str(tmp_path / "static"), "--quantize", "int8_static", "--rounds", "0"]
    assert cli.main(["export", str(folder), *out, "--calibration", str(tmp_path / "text.txt")]) == 0
    assert "int8_static, then comparing it with PyTorch" in capsys.readouterr().out
    model = HybridForCausalLM.from_pretrained(folder)
    quantize(model, "nf4", double_quant=True)
    model.save_pretrained(tmp_path / "nf4")
    shutil.copy(folder / "tokenizer.json", tmp_path / "nf4")
    assert cli.main(["export", str(tmp_path / "nf4"), "--out", str(tmp_path / "own"), "--rounds", "1"]) == 0
    printed = capsys.readouterr().out
    assert "opset 23, nf4, then" in printed
    assert [line.split()[1] for line in printed.splitlines() if line.startswith(("PyTorch", "ONNX"))] == ["nf4"] * 2
    assert cli.main(["export", str(tmp_path / "nf4"), "--out", str(tmp_path / "twice"), "--quantize", "int8"]) == 2
    assert "quantize='int8' is for a float model" in capsys.readouterr().err


def test_the_command_answers_bad_input_in_one_line(folder: Path, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "bert").mkdir()
    (tmp_path / "bert" / "config.json").write_text('{"model_type": "bert"}')
    shutil.copytree(folder, tmp_path / "torn", ignore=shutil.ignore_patterns("onnx"))
    (tmp_path / "torn" / "model.safetensors").write_bytes(b"torn")
    out = ["--out", str(tmp_path / "out")]
    cases = [
        ([str(tmp_path / "none"), *out], "there is no folder"),
        ([str(tmp_path), *out], "holds no config.json"),
        ([str(tmp_path / "bert"), *out], "holds a model of type 'bert', which cannot be exported"),
        ([str(tmp_path / "torn"), *out], "cannot be read"),
        ([str(folder), "--task", "translation", *out], "--task translation needs 'cvm'"),
        ([str(folder), "--quantize", "int3", *out], "invalid choice: 'int3'"),
        ([str(folder), "--quantize", "int8_static", *out], "--calibration FILE is for --quantize int8_static"),
        ([str(folder), "--quantize", "int8_static", "--calibration", "none.txt", *out], "none.txt cannot be read"),
        ([str(folder), "--double-quant", *out], "--double-quant is for --quantize nf4 and fp4"),
    ]
    for arguments, message in cases:
        assert cli.main(["export", *arguments]) == 2
        told = capsys.readouterr().err
        assert message in told
        assert told.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_exact_sums_are_asked_for_where_a_cpu_would_cut_them(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    for flags, wanted in (("fma avx2", True), ("avx2 avx_vnni", False), ("avx512_vnni", False)):
        (tmp_path / "cpuinfo").write_text(f"flags : {flags}")
        assert session_file._sums_saturate(str(tmp_path / "cpuinfo")) is wanted
    assert session_file._sums_saturate(str(tmp_path / "none"))
    monkeypatch.setattr("platform.machine", lambda: "aarch64")
    assert not session_file._sums_saturate()
