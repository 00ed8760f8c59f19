"""`neural-layers generate` and `neural-layers chat`: text, its stops, and what is answered to bad input."""

import io
import json
import re
import shutil
import signal
import subprocess
import sys

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

from neural_layers.cli import main
from neural_layers.errors import InputError
from neural_layers.models.loading import load_language_model
from tests.models.generation_samples import make_model, make_tokenizer

PROMPT = "the quick fox and the dog"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model's folder, and another's with the same tokenizer."""
    folder, tokenizer = tmp_path_factory.mktemp("models"), make_tokenizer()
    for name, seed in (("model", 0), ("small", 1)):
        model = make_model("hybrid" if name == "model" else "mamba", seed, vocab_size=len(tokenizer), pad_token_id=None)
        model.float().save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    return folder


@pytest.fixture
def run(saved, capsys, monkeypatch):
    def run(*arguments, stdin: str = "", folder="model"):
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        command, *rest = arguments
        status = main([command, str(saved / folder), *map(str, rest)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return run


def said(saved, prompt=PROMPT, **arguments):
    """What `generate` of the library says."""
    model, tokenizer = load_language_model(saved / "model")
    ids = tokenizer(prompt, return_tensors="pt")
    torch.manual_seed(3)
    found = model.generate(**ids, tokenizer=tokenizer, **{"max_new_tokens": 20, "do_sample": False, **arguments})
    return [tokenizer.decode(row[ids.input_ids.shape[1] :], skip_special_tokens=True) for row in found]


@pytest.mark.parametrize(
    ("flags", "arguments"),
    [
        ("", {}),
        ("--greedy", {}),
        ("--repetition-penalty 1.5", {"repetition_penalty": 1.5}),
        ("--no-repeat-ngram 2 --prefill-chunk 3", {"no_repeat_ngram_size": 2}),
        ("--prompt-lookup 3", {}),
        ("--beams 3 --length-penalty 0.5", {"num_beams": 3, "length_penalty": 0.5}),
        ("--temperature 1.5 --seed 3", {"do_sample": True, "temperature": 1.5}),
        (
            "--top-p 0.8 --min-p 0.01 --typical-p 0.9 --seed 3",
            {"do_sample": True, "top_p": 0.8, "min_p": 0.01, "typical_p": 0.9},
        ),
    ],
)
def test_generate_prints_what_generate_says(run, saved, flags, arguments) -> None:
    status, out, error = run("generate", "--prompt", PROMPT, "--max-new-tokens", 20, *flags.split())
    assert (status, out) == (0, said(saved, **arguments)[0] + "\n")
    assert re.fullmatch(r"\d+ tokens in [\d.]+ s: [\d.]+ tokens/s\n", error)


def test_an_assistant_changes_nothing_but_the_time(run, saved) -> None:
    status, out, _ = run("generate", "--prompt", PROMPT, "--max-new-tokens", 20, "--assistant", saved / "small")
    assert (status, out) == (0, said(saved)[0] + "\n")


def test_the_n_best_beams_are_printed_with_their_scores(run, saved) -> None:
    status, out, _ = run("generate", "--prompt", PROMPT, "--max-new-tokens", 20, "--beams", 4, "--n-best", 2)
    first, second = said(saved, num_beams=4, num_return_sequences=2)
    assert status == 0
    scores = [float(score) for score in re.findall(r"^\[\d\] (-?[\d.]+)$", out, re.MULTILINE)]
    assert out == f"[1] {scores[0]:.3f}\n{first}\n[2] {scores[1]:.3f}\n{second}\n"
    assert scores[0] >= scores[1]


def test_stop_strings_standard_input_and_contrastive_search(run, saved) -> None:
    whole = said(saved)[0]
    stop = next(whole[i : i + 2] for i in range(5, len(whole)) if whole[i : i + 2].isascii())
    status, out, _ = run("generate", "--prompt", "-", "--max-new-tokens", 20, "--stop", stop, stdin=PROMPT + "\n")
    assert status == 0
    assert whole.startswith(out.removesuffix("\n"))
    assert stop in out
    assert run("generate", "--prompt", PROMPT, "--contrastive", 0.6, "--max-new-tokens", 20)[:2] != (0, whole + "\n")


def test_chat_answers_piped_lines_and_commands(run) -> None:
    def chat(lines):
        status, out, error = run("chat", "--max-new-tokens", 6, stdin=lines)
        assert status == 0
        return out, error

    lines = "hello\nand the fox?\n/undo\n/help\n/what\n\nand the fox?\n/reset\nhello\n/quit\nnever read\n"
    out, error = chat(lines)
    first, both = chat("hello\n")[0], chat("hello\nand the fox?")[0]
    second = both.removeprefix(first)
    assert first != second != ""
    assert out == first + second + second + first
    assert "(taken back: and the fox?)" in error
    assert "(a new conversation)" in error
    assert "/undo   take the last turn back" in error
    assert "there is no command /what" in error


def test_chat_tells_of_a_full_context_and_goes_on(run) -> None:
    status, out, error = run("chat", "--greedy", stdin="hello\nand the fox?\n/reset\n/undo\nhello\n")
    assert status == 0
    assert error.count("(the context is full; /reset)") == 2
    assert "(the conversation has 128 tokens" in error
    assert "(there is no turn to undo)" in error
    assert out


def test_ctrl_c_stops_the_answer_and_not_the_program(saved, tmp_path) -> None:
    shutil.copytree(saved / "model", tmp_path / "long")
    config = json.loads((tmp_path / "long" / "config.json").read_text())
    (tmp_path / "long" / "config.json").write_text(json.dumps({**config, "max_position_embeddings": 100_000}))
    command = [sys.executable, "-m", "neural_layers", "chat", str(tmp_path / "long"), "--max-new-tokens", "90000"]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    chat = subprocess.Popen(command, **pipes)
    chat.stdin.write(b"hello\n")
    chat.stdin.flush()
    assert chat.stdout.read(1)
    chat.send_signal(signal.SIGINT)
    _, error = chat.communicate(b"/undo\n", timeout=60)
    assert chat.returncode == 0
    assert b"(stopped)" in error
    assert b"(taken back: hello)" in error


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--temperature 0", "--temperature 0 must be above 0; leave it out, or give --greedy"),
        ("--temperature -1", "--temperature -1 must be above 0"),
        ("--temperature nan", "--temperature nan must be above 0"),
        ("--top-k 0", "--top-k 0 must be at least 1"),
        ("--top-p 1.5", "--top-p 1.5 must lie from 0 to 1"),
        ("--min-p -0.1", "--min-p -0.1 must lie from 0 to 1"),
        ("--typical-p 1", "--typical-p 1 must lie between 0 and 1"),
        ("--repetition-penalty 0", "--repetition-penalty 0 must be above 0"),
        ("--no-repeat-ngram 0", "--no-repeat-ngram 0 must be at least 1"),
        ("--contrastive 2", "--contrastive 2 must lie from 0 to 1"),
        ("--max-new-tokens 0", "--max-new-tokens 0 must be at least 1"),
        ("--prefill-chunk 0", "--prefill-chunk 0 must be at least 1"),
        ("--beams 1", "--beams 1 must be at least 2"),
        ("--beams 2 --stream", "--stream and --beams 2 do not go together: which text is best is known at the end"),
        ("--beams 2 --contrastive 0.6", "--contrastive 0.6 and --beams 2 do not go together"),
        ("--beams 2 --prompt-lookup 3", "--prompt-lookup 3 and --beams 2 do not go together"),
        ("--contrastive 0.6 --temperature 2", "--temperature 2.0 and --contrastive 0.6 do not go together"),
        ("--greedy --top-p 0.5", "--top-p 0.5 and --greedy do not go together"),
        ("--assistant x --prompt-lookup 3", "--assistant x and --prompt-lookup 3 do not go together"),
        ("--n-best 2", "--n-best 2 compares beams; add --beams 4"),
        ("--length-penalty 2", "--length-penalty 2.0 compares beams"),
        ("--beams 2 --n-best 3", "--n-best 3 is more than --beams 2"),
        ("--seed 1", "--seed 1: nothing is drawn; add --temperature"),
        ("--max-new-tokens 500", "500 new ones are over the context of 128"),
        ("--assistant nowhere", "there is no folder nowhere"),
        ("--top-k many", "argument --top-k: invalid int value: 'many'"),
    ],
)
def test_wrong_or_contradicting_options_are_answered_in_one_line(run, flags, message) -> None:
    status, out, error = run("generate", "--prompt", PROMPT, *flags.split())
    assert (status, out) == (2, "")
    assert message in error
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("prompt", "message"),
    [("", "the prompt is empty"), ("word " * 200, "the model reads 128 with what it adds; shorten it to 127")],
)
def test_prompts_that_cannot_be_continued_are_answered(run, prompt, message) -> None:
    for arguments in (("--prompt", prompt), ("--prompt", "-")):
        status, _, error = run("generate", *arguments, stdin=prompt)
        assert status == 2
        assert message in error


def _change(name, value):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, name: value}))

    return change


def _cut(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:5000])


def _poison(folder):
    model, _ = load_language_model(folder)
    with torch.no_grad():
        model.lm_head.weight[3, 3] = torch.nan
    model.save_pretrained(folder)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, "there is no folder"),
        (lambda folder: (folder / "config.json").unlink(), "holds no config.json"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json cannot be read"),
        (_change("model_type", "llama"), "holds a model of type 'llama', and a hybrid language model"),
        (lambda folder: (folder / "model.safetensors").unlink(), "holds no model.safetensors; weights are read from"),
        (_cut, "the model in"),
        (
            _change("hidden_size", 32),
            "do not fit its config.json: lm_head.weight has shape (300, 16), expected (300, 32)",
        ),
        (_change("num_hidden_layers", 5), "config.json cannot be used"),
        (_poison, "lm_head.weight in"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "the tokenizer in"),
        (lambda folder: [f.unlink() for f in folder.glob("tokenizer*")], "holds no tokenizer.json; save the tokenizer"),
        (
            lambda folder: make_tokenizer(310).save_pretrained(folder),
            "has 310 tokens (ids to 309), and the model a voc",
        ),
    ],
)
def test_folders_that_cannot_serve_are_answered_in_one_line(saved, tmp_path, run, damage, message) -> None:
    folder = tmp_path / "model"
    shutil.copytree(saved / "model", folder)
    damage(folder)
    for arguments in (("generate", "--prompt", "a"), ("chat",)):
        status, _, error = run(*arguments, folder=folder, stdin="a\n")
        assert status == 2, error
        assert message in error
        assert error.count("\n") == 1


def test_an_assistant_of_another_vocabulary_is_refused(saved, tmp_path, run) -> None:
    tokenizer = make_tokenizer(280)
    make_model(vocab_size=len(tokenizer), pad_token_id=None).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    status, _, error = run("generate", "--prompt", "a", "--assistant", tmp_path)
    assert status == 2
    assert "has another tokenizer (280 tokens, not 300)" in error


def test_the_loader_takes_ends_from_the_tokenizer_and_padded_vocabularies(saved, tmp_path) -> None:
    model, tokenizer = load_language_model(saved / "model")
    own = model.generation_config
    assert own.eos_token_id == own.pad_token_id == own.bos_token_id == tokenizer.eos_token_id == 0
    assert not model.training
    make_model(vocab_size=384, pad_token_id=None).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert load_language_model(tmp_path)[0].config.vocab_size == 384
    make_model(vocab_size=1000, pad_token_id=None).save_pretrained(tmp_path)
    with pytest.raises(InputError, match="a vocabulary of 1000"):
        load_language_model(tmp_path)
