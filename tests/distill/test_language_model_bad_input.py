"""What `neural-layers train` and `evaluate` say of input that a person can mend: one line, with value and remedy."""

import json
import shutil

import pytest

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("tensorboard", reason="tensorboard is not installed")

from neural_layers.cli import main
from neural_layers.distill.recipes.language_model import train_language_model
from tests.distill.language_runs import arguments, small_options, write_corpus


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A finished run of one step, which the cases below are continued from or disturb a copy of."""
    folder = tmp_path_factory.mktemp("finished")
    write_corpus(folder / "data")
    options = small_options(folder, steps=1)
    train_language_model(options)
    return options


def told(capsys, *given: str) -> str:
    capsys.readouterr()
    assert main(given) == 2
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("neural-layers: ")]
    assert len(lines) == 1, error
    assert "Traceback" not in error
    return lines[0]


CASES = [
    ("--data {}/missing.txt", "no such file or folder"),
    ("--data {}/empty.txt", "empty.txt: no text in it; give data that is not empty"),
    ("--data {}/short.txt", "has 6 tokens, fewer than the 16 of one sequence; give more text, or --context 6 or less"),
    ("--data {}/broken.jsonl", "line 2: not JSON"),
    ("--data {}/fields.jsonl", "no field 'text'; choose with --text-field among: body, id"),
    ("--data {}/broken.txt.gz", "broken gzip file"),
    ("--data {}/broken.parquet", "broken parquet file"),
    ("--data {}/data=0", "weight 0 must be a positive number"),
    ("--data {}/data --data {}/long.txt=1e-9", "weight 1e-09 is less than 1 in 8192 of all weights"),
    ("--data {}/data --valid {}/missing.txt", "no such file or folder"),
    ("--data {}/data --context 1", "--context 1 must be at least 2"),
    ("--data {}/data --max-context 15", "--max-context 15 must be at least --context 16"),
    ("--data {}/data --valid-fraction 1", "--valid-fraction 1.0 must lie between 0 and 1"),
    ("--data {}/data --valid-fraction 0.1 --valid {}/long.txt", "does not go with --valid; leave one of them out"),
    ("--data {}/long.txt --valid-fraction 0.001", "tokens; give a larger one, or --valid"),
    ("--data {}/data --steps 0", "--steps 0 must be at least 1"),
    ("--data {}/data --warmup 9 --steps 8", "--warmup 9 must lie between 0 and --steps 8"),
    ("--data {}/data --lr nan", "--lr nan must be a finite number"),
    ("--data {}/data --label-smoothing 1", "--label-smoothing 1.0 must lie in [0, 1)"),
    ("--data {}/data --schedule sine", "--schedule sine must be one of cosine, linear, constant"),
    ("--data {}/data --seed -1", "--seed -1 is out of range"),
    ("--data {}/data --tokenizer bpe:many", "write bpe:VOCABULARY with a number"),
    ("--data {}/data --tokenizer bpe:9", "bpe:9 is too small"),
    ("--data {}/data --tokenizer {}/nowhere", "--tokenizer takes char, bpe:VOCABULARY or a tokenizer's folder"),
    ("--data {}/data --preset huge", "there is no preset 'huge'"),
    ("--data {}/data --mixers hyena", "--mixers hyena is unknown; give hybrid, samba"),
    ("--data {}/data --mixers mamba,mamba2,mamba", "--mixers names 3 layers and the model has 4"),
    ("--data {}/data --width 30 --heads 4", "the model cannot be built: hidden_size=30 must be a multiple"),
    ("--data {}/long.txt --patience 2", "--patience needs a validation text; give one with --valid"),
    ("--data {}/data --fsdp", "run by torchrun, or leave it out"),
    ("--data {}/data --resume", "holds no run to resume"),
    ("--data {}/data --model {}/data", "holds no config.json; give a folder that a model was saved to"),
    (
        "--data {}/data --model {}/llama",
        "holds a model of type 'llama', and a hybrid language model ('neural_hybrid') is needed",
    ),
    ("--data {}/data --model {}/truncated", "cannot be read"),
    ("--data {}/data --model {}/foreign", "do not fit its config.json"),
    (
        "--data {}/data --model {}/good --tokenizer bpe:300",
        "--tokenizer differs from the tokenizer of the model",
    ),
    ("--data {}/data --model {}/good --tokenizer {}/swapped", "--tokenizer differs from the tokenizer of the model"),
    ("--data {}/data --model {}/good --context 17", "--context 17 is longer than the 16 tokens of the model"),
    ("--data {}/data --model {}/good --width 8", "--width changes the model of --model; leave one of them out"),
    ("--data {}/data --threads 0", "--threads 0 must be at least 1"),
]


@pytest.fixture(scope="module")
def folder(finished, tmp_path_factory):
    root = tmp_path_factory.mktemp("bad")
    write_corpus(root / "data")
    (root / "empty.txt").write_text("")
    (root / "short.txt").write_text("short")
    (root / "long.txt").write_text("long enough for a sequence " * 9)
    (root / "broken.jsonl").write_text('{"text": "a"}\n{"text"')
    (root / "fields.jsonl").write_text('{"body": "a", "id": 1}')
    (root / "broken.txt.gz").write_bytes(b"plain")
    (root / "broken.parquet").write_bytes(b"plain")
    model = finished.out / "model"
    for name in ("good", "llama", "truncated", "foreign", "swapped"):
        shutil.copytree(model, root / name)
    config = json.loads((model / "config.json").read_text())
    (root / "llama" / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    (root / "foreign" / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    weights = (model / "model.safetensors").read_bytes()
    (root / "truncated" / "model.safetensors").write_bytes(weights[: len(weights) // 2])
    tokenizer = (model / "tokenizer.json").read_text()
    swapped = json.loads(tokenizer)
    vocabulary = swapped["model"]["vocab"]
    vocabulary["a"], vocabulary["e"] = vocabulary["e"], vocabulary["a"]
    (root / "swapped" / "tokenizer.json").write_text(json.dumps(swapped))
    return root


@pytest.mark.parametrize(("given", "message"), CASES)
def test_bad_input_is_told_in_one_line(folder, tmp_path, capsys, given: str, message: str) -> None:
    options = given.format(*[folder] * 4).split()
    common = ["--out", str(tmp_path / "run"), "--cache", str(tmp_path / "cache")]
    for name, value in (("--context", "16"), ("--steps", "2")):
        if name not in options:
            common += [name, value]
    assert message in told(capsys, "train", *options, *common)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_an_option_that_changed_is_named(finished, capsys) -> None:
    for option, value in (("--lr", "0.5"), ("--batch", "2"), ("--mixers", "mamba"), ("--bf16", None)):
        given = arguments(finished)
        if option in given:
            at = given.index(option)
            del given[at : at + 2]
        given += [option] if value is None else [option, value]
        message = told(capsys, "train", *given)
        assert f"{option} was " in message
        assert "give the same to continue it, or another --out" in message


def test_a_disk_that_is_full_is_told_in_one_line_and_loses_nothing(tmp_path, capsys) -> None:
    import resource

    write_corpus(tmp_path / "data")
    options = small_options(tmp_path, steps=4)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (40_000, hard))  # enough for the weights, not for the optimiser
    try:
        assert main(["train", *arguments(options)]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    error = capsys.readouterr().err
    assert len([line for line in error.splitlines() if line.startswith("neural-layers: ")]) == 1
    assert "neural-layers: weights cannot be written: " in error
    assert "File too large" in error
    assert not list((options.out / "checkpoints").iterdir())
    assert main(["train", *arguments(options)]) == 0


def test_a_folder_of_something_else_is_left_alone(tmp_path, capsys) -> None:
    write_corpus(tmp_path / "data")
    given = arguments(small_options(tmp_path))
    out = tmp_path / "run"
    out.mkdir()
    (out / "thesis.tex").write_text("x")
    assert "is not empty (thesis.tex) and nothing in it is overwritten" in told(capsys, "train", *given)
    (out / "thesis.tex").rename(out / "config.json")
    assert "config.json is no run's config; give another --out" in told(capsys, "train", *given)
    (out / "config.json").write_text('{"recipe": "cvm"}')
    assert "is the folder of another kind of run" in told(capsys, "train", *given)
    shutil.rmtree(out)
    out.write_text("x")
    assert "is a file; --out takes a folder" in told(capsys, "train", *given)


def test_data_that_changed_under_a_run_is_told(finished, tmp_path, capsys) -> None:
    write_corpus(tmp_path / "data")
    options = small_options(tmp_path, steps=4)
    train_language_model(options)
    (options.out / "report.json").unlink()
    with (tmp_path / "data" / "train.txt").open("a") as file:
        file.write("one word more")
    assert "the data has changed since the run in" in told(capsys, "train", *arguments(options))


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("", "give --data with a text to read, or --tasks"),
        ("--data {0}/missing.txt", "no such file or folder"),
        ("--data {0}/empty.txt", "no text in it"),
        ("--data {0}/data --context 99", "--context 99 must lie between 2 and 16"),
        ("--data {0}/data --context 8 --stride 8", "--stride 8 must lie between 1 and 7"),
        ("--data {0}/data --batch 0", "--batch 0 must be at least 1"),
        ("--tasks arc_easy", "pip install 'lm-eval[hf]'"),
    ],
)
def test_bad_input_of_evaluate_is_told_in_one_line(folder, tmp_path, capsys, given: str, message: str) -> None:
    options = given.format(folder).split()
    assert message in told(capsys, "evaluate", str(folder / "good"), *options, "--cache", str(tmp_path / "cache"))


def test_tasks_run_through_the_harness_where_it_is_installed(folder, tmp_path, capsys, monkeypatch) -> None:
    import sys
    import types

    seen: dict = {}

    def simple_evaluate(**given):
        seen.update(given)
        if given["tasks"] == ["unknown"]:
            raise KeyError("unknown")
        return {"results": {"arc_easy": {"acc,none": 0.25}}}

    harness = types.ModuleType("lm_eval")
    harness.simple_evaluate = simple_evaluate  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "lm_eval", harness)
    model, file = str(folder / "good"), tmp_path / "tasks.json"
    assert main(["evaluate", model, "--tasks", "arc_easy", "--json", str(file)]) == 0
    assert seen == {"model": "hf", "model_args": {"pretrained": model}, "tasks": ["arc_easy"], "batch_size": 8}
    assert json.loads(file.read_text()) == {"arc_easy": {"acc,none": 0.25}}
    assert "acc,none=0.25" in capsys.readouterr().out
    assert "see lm-eval ls tasks" in told(capsys, "evaluate", model, "--tasks", "unknown")


def test_evaluate_prints_its_table_and_writes_json(folder, tmp_path, capsys) -> None:
    file = tmp_path / "figures.json"
    given = ["--data", f"{folder}/data", "--cache", str(tmp_path / "cache"), "--json", str(file)]
    assert main(["evaluate", str(folder / "good"), *given]) == 0
    shown = capsys.readouterr().out
    for name in ("perplexity", "bits per byte", "tokens/s", "peak memory", "tokens before it"):
        assert name in shown
    assert json.loads(file.read_text())["loss"] > 0
