"""`neural-layers prune`: what it writes, and what is answered to bad input."""

import json

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("accelerate", reason="accelerate is not installed")

from neural_layers.cli import main
from neural_layers.distill.recipes.language_model import train_language_model
from neural_layers.models.loading import load_language_model
from neural_layers.wrappers.pruning import sparsity
from tests.distill.language_runs import small_options, write_corpus


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a corpus in data/ and a trained model in run/model."""
    folder = tmp_path_factory.mktemp("prune")
    write_corpus(folder / "data")
    train_language_model(small_options(folder, steps=2, eval_steps=2, report_to="none"))
    return folder


@pytest.fixture
def run(folder, tmp_path, capsys):
    def run(*arguments, out="out"):
        status = main(["prune", str(folder / "run" / "model"), "--out", str(tmp_path / out), *map(str, arguments)])
        captured = capsys.readouterr()
        return status, captured.out, captured.err, tmp_path / out

    return run


def training(folder) -> tuple:
    short = ("--context", 16, "--batch", 4, "--steps", 6, "--lr", 0.01)
    return ("--data", folder / "data", "--cache", folder / "cache", *short)


def test_weights_are_pruned_step_by_step_and_the_losses_compared(run, folder) -> None:
    status, printed, _, out = run("--amount", 0.6, "--scope", "global", "--times", 2, *training(folder))
    assert status == 0
    report = json.loads((out / "pruning.json").read_text())
    assert list(report["scores"]) == ["as given", "pruned at once", "trained on"]
    assert report["scores"]["trained on"]["loss"] < report["scores"]["pruned at once"]["loss"]
    for name in ("start", "training/model"):
        model, _ = load_language_model(out / name)
        assert sparsity(model).sparsity == pytest.approx(0.6, abs=1e-3)
    assert "trained on" in printed
    assert printed.rstrip().endswith("pruning.json")
    again = run("--amount", 0.6, "--scope", "global", "--times", 2, *training(folder))
    assert again[0] == 0, "a finished run is told again"
    status, _, told, _ = run("--amount", 0.5, "--times", 2, *training(folder))
    assert status == 2
    assert "holds a run with other options" in told


def test_the_seed_is_that_of_what_is_drawn(run, tmp_path) -> None:
    zeros = []
    for seed, out in ((1, "a"), (2, "b"), (1, "c")):
        assert run("--method", "random", "--amount", 0.5, "--seed", seed, out=out)[0] == 0
        zeros.append(load_language_model(tmp_path / out / "start")[0].state_dict())
    name = next(key for key in zeros[0] if key.endswith("q_proj.weight"))
    assert torch.equal(zeros[0][name], zeros[2][name])
    assert not torch.equal(zeros[0][name], zeros[1][name])


def test_a_file_is_no_folder_to_write_to(run, tmp_path) -> None:
    (tmp_path / "out").write_text("mine")
    status, _, told, out = run("--amount", 0.5)
    assert status == 2
    assert "is a file; give a new folder" in told
    assert out.read_text() == "mine"


def test_units_are_removed_without_text(run) -> None:
    status, printed, _, out = run("--remove", "feed_forward=0.5", "--remove", "mamba=0.25", "--multiple-of", 4)
    assert status == 0
    model, tokenizer = load_language_model(out / "start")
    assert (model.config.intermediate_size, model.config.mamba_inner_size) == (12, 24)
    ids = tokenizer("the old man", return_tensors="pt").input_ids
    assert model.generate(ids, max_new_tokens=3).shape[1] > ids.shape[1]
    assert "intermediate_size=12, mamba_inner_size=24" in printed
    assert torch.isfinite(model(ids).logits).all()


def test_units_are_scored_on_the_text_and_the_shrunken_model_trained_on(run, folder) -> None:
    status, _, _, out = run("--remove", "feed_forward=0.5", "--scores", "data", *training(folder))
    assert status == 0
    report = json.loads((out / "pruning.json").read_text())
    assert report["parameters"]["after"] < report["parameters"]["before"]
    assert report["scores"]["trained on"]["loss"] < report["scores"]["pruned at once"]["loss"]
    assert load_language_model(out / "training" / "model")[0].config.intermediate_size == 12


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "give --amount, the share of weights to prune, or --remove KIND=SHARE"),
        (("--amount", 1.5), "amount=1.5 must be a number in [0, 1)"),
        (("--amount", 0.5, "--include", "q_prj"), "'q_prj' matches no module; the nearest are"),
        (("--amount", 0.5, "--remove", "mamba=0.5"), "run one, then the other"),
        (("--method", "n:m", "--pattern", "2-4"), "--pattern 2-4 must be N:M"),
        (("--method", "n:m", "--pattern", "2:7"), "which are no multiple of m=7"),
        (("--remove", "mamba"), "--remove mamba must be KIND=SHARE"),
        (("--remove", "heads=0.5"), "must give shares to some of feed_forward"),
        (("--remove", "kv_heads=0.5"), "is no whole number; possible are none"),
        (("--amount", 0.5, "--data", "d", "--steps", 4, "--times", 9), "--times 9 and --recovery 1 need 9 steps"),
        (("--remove", "mamba=0.5", "--scores", "data"), "--scores data must be norms, or data, which needs --remove"),
        (("--amount", 0.5, "--threads", 0), "--threads 0 must be at least 1"),
        (("--amount", 0.5, "--steps", 9), "--steps 9 is for a training; give --data"),
        (("--amount", 0.5, "--shape", "round"), "--shape round is for a training"),
        (("--amount", 0.5, "--seed", 0), "--seed 0 is for a training"),
        (("--amount", 0.5, "--multiple-of", 1), "--multiple-of 1 is for --remove"),
        (("--remove", "mamba=0.5", "--method", "l1"), "--method l1 is for weights"),
        (("--remove", "mamba=0.5", "--data", "d", "--times", 3), "--times 3 is for weights"),
        (("--remove", "mamba=0.5", "--remove", "mamba=0.25"), "--remove mamba is given twice"),
        (("--method", "n:m", "--data", "d", "--times", 3), "--times 3 does not go with --method n:m"),
    ],
)
def test_bad_input_is_told_in_one_line_and_writes_nothing(run, arguments, message) -> None:
    status, _, told, out = run(*arguments)
    assert status == 2, told
    assert message in told
    assert told.count("\n") == 1
    assert not out.exists()
