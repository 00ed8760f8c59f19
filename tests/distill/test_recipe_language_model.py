"""`neural-layers train`: what it leaves, and that it ends the same however it is interrupted."""

import json
import os
import shutil
import signal
import time
from dataclasses import replace

import numpy as np
import pytest

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("tensorboard", reason="tensorboard is not installed")

from transformers import AutoModelForCausalLM, AutoTokenizer

from neural_layers.distill import checkpoint as checkpoints
from neural_layers.distill.checkpoint import newest_checkpoint
from neural_layers.distill.recipes import language_model as recipe
from neural_layers.distill.recipes.language_model import train_language_model
from neural_layers.distill.recipes.language_model_evaluation import EvaluationOptions, evaluate_language_model
from neural_layers.distill.recipes.language_model_trainer import LanguageModelTrainer
from tests.distill.language_runs import arguments, log_of, small_options, start, weights_of, write_corpus


@pytest.fixture
def options(tmp_path):
    write_corpus(tmp_path / "data")
    return small_options(tmp_path)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run that nobody disturbed, with dropout and accumulation, so that random state and batches matter."""
    folder = tmp_path_factory.mktemp("finished")
    write_corpus(folder / "data")
    options = small_options(folder, dropout=0.1, accumulate=2, label_smoothing=0.1)
    return options, train_language_model(options, "neural-layers train")


def test_a_run_leaves_what_its_folder_promises(finished) -> None:
    options, report = finished
    run = options.out
    config = json.loads((run / "config.json").read_text())
    assert config["options"]["dropout"] == 0.1
    assert {"versions", "seed", "git_revision", "threads", "data", "parameters"} <= set(config)
    assert [record["step"] for record in log_of(run) if "loss" in record] == list(range(1, 9))
    assert {path.name for path in (run / "validation").iterdir()} == {"step-4.json", "step-8.json"}
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"checkpoint-6", "checkpoint-8"}
    assert list((run / "tensorboard").iterdir())
    assert json.loads((run / "report.json").read_text()) == report
    assert not [path for path in run.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl")]
    assert report["validation"]["loss"] < 3


def test_the_result_loads_by_the_auto_classes_and_generates(finished) -> None:
    options, _ = finished
    model = AutoModelForCausalLM.from_pretrained(options.out / "model")
    tokenizer = AutoTokenizer.from_pretrained(options.out / "model")
    assert model.config.use_cache
    found = model.generate(**tokenizer("the", return_tensors="pt"), max_new_tokens=8, do_sample=False)
    assert len(tokenizer.decode(found[0])) >= 8


def test_the_reported_loss_is_that_of_the_saved_model(finished) -> None:
    options, report = finished
    valid = options.out.parent / "data" / "valid.txt"
    found = evaluate_language_model(
        EvaluationOptions(options.out / "model", str(valid), context=options.context, cache=options.cache)
    )
    for name in ("loss", "perplexity", "bits_per_byte"):
        assert found[name] == pytest.approx(report["validation"][name], rel=1e-5)
    assert found["tokens"] == len(valid.read_text())
    assert found["tokens_per_second"] > 0 < found["peak_memory_mib"]


def test_a_finished_run_is_told_and_left_alone(finished) -> None:
    options, report = finished
    before = weights_of(options.out)
    assert train_language_model(replace(options, resume=True)) == report
    assert weights_of(options.out) == before


def test_a_run_killed_half_way_ends_with_the_same_bits(finished, tmp_path) -> None:
    reference, _ = finished
    options = replace(reference, out=tmp_path / "run")
    process = start(["-m", "neural_layers", "train", *arguments(options)])
    deadline = time.monotonic() + 60
    while not (options.out / "checkpoints" / "checkpoint-2").exists() and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.kill()
    process.communicate()
    if process.returncode == 0:
        pytest.skip("the run was over before it could be killed")
    assert not (options.out / "report.json").exists()
    train_language_model(options)
    assert weights_of(options.out) == weights_of(reference.out)
    kept = [{k: v for k, v in record.items() if k != "tokens_per_second"} for record in log_of(options.out)]
    assert kept == [{k: v for k, v in r.items() if k != "tokens_per_second"} for r in log_of(reference.out)]


KILLED_WHILE_SAVING = """
import os, signal, sys
import neural_layers.distill.checkpoint as checkpoints
real, calls = checkpoints.save_file, []
def save_file(*args, **kwargs):
    calls.append(1)
    if len(calls) == 3:
        args[1].write_bytes(b"half of it")
        os.kill(os.getpid(), signal.SIGKILL)
    return real(*args, **kwargs)
checkpoints.save_file = save_file
from neural_layers.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_a_run_killed_while_it_saves_ends_with_the_same_bits(finished, tmp_path) -> None:
    reference, _ = finished
    options = replace(reference, out=tmp_path / "run")
    process = start(["-c", KILLED_WHILE_SAVING, "train", *arguments(options)])
    output, _ = process.communicate(timeout=100)
    assert process.returncode == -signal.SIGKILL, output
    folder = options.out / "checkpoints"
    assert [path for path in folder.iterdir() if path.name.startswith(".checkpoint-6")]
    newest = newest_checkpoint(folder)
    assert newest is not None
    assert newest.step == 4
    train_language_model(options)
    assert weights_of(options.out) == weights_of(reference.out)
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("damage", ["truncated weights", "no optimizer", "half of the state"])
def test_a_broken_checkpoint_is_passed_over(finished, tmp_path, damage: str) -> None:
    reference, _ = finished
    options = replace(reference, out=tmp_path / "run")
    shutil.copytree(reference.out, options.out)
    shutil.rmtree(options.out / "model")
    (options.out / "report.json").unlink()
    last = options.out / "checkpoints" / "checkpoint-8"
    if damage == "truncated weights":
        os.truncate(last / "model.safetensors", 200)
    elif damage == "no optimizer":
        (last / "optimizer.safetensors").unlink()
    else:
        os.truncate(last / "state.json", 100)
    train_language_model(options)
    assert weights_of(options.out) == weights_of(reference.out)


def test_a_run_that_was_killed_between_training_and_result_writes_the_result(finished, tmp_path) -> None:
    reference, report = finished
    options = replace(reference, out=tmp_path / "run")
    shutil.copytree(reference.out, options.out)
    shutil.rmtree(options.out / "model")
    (options.out / "report.json").unlink()
    again = train_language_model(options)
    assert weights_of(options.out) == weights_of(reference.out)
    assert again["validation"] == report["validation"]


def test_streamed_training_resumes_to_the_same_bits(tmp_path) -> None:
    write_corpus(tmp_path / "data")
    whole = small_options(tmp_path, "whole", streaming=True, dropout=0.1)
    train_language_model(whole)
    cut = replace(whole, out=tmp_path / "cut")
    shutil.copytree(whole.out, cut.out)
    for name in ("model", "checkpoints/checkpoint-8"):
        shutil.rmtree(cut.out / name)
    (cut.out / "report.json").unlink()
    train_language_model(cut)
    assert weights_of(cut.out) == weights_of(whole.out)


def test_the_loss_in_the_log_is_the_mean_over_a_resume_too(tmp_path, monkeypatch) -> None:
    write_corpus(tmp_path / "data")
    real = recipe.training_arguments
    monkeypatch.setattr(recipe, "training_arguments", lambda *given: _logging_every(5, real(*given)))
    whole = small_options(tmp_path, "whole", steps=5, save_steps=3)
    train_language_model(whole)
    cut = replace(whole, out=tmp_path / "cut")
    shutil.copytree(whole.out, cut.out)
    for name in ("model", "checkpoints/checkpoint-5"):
        shutil.rmtree(cut.out / name)
    (cut.out / "report.json").unlink()
    train_language_model(cut)
    losses = [[record["loss"] for record in log_of(run.out) if "loss" in record] for run in (whole, cut)]
    assert len(losses[0]) == 1
    assert losses[0] == losses[1]


def _logging_every(steps: int, arguments):
    arguments.logging_steps = steps
    return arguments


def test_accumulated_batches_train_as_one_large_batch(options) -> None:
    large = replace(options, out=options.out.parent / "large", batch=8)
    small = replace(options, out=options.out.parent / "small", batch=2, accumulate=4)
    losses = []
    for chosen in (large, small):
        train_language_model(chosen)
        losses.append([record["loss"] for record in log_of(chosen.out) if "loss" in record])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


def test_training_stops_by_itself_and_keeps_the_best(options) -> None:
    patient = replace(
        options, steps=60, eval_steps=2, save_steps=2, patience=2, lr=0.5, min_lr=0.5, schedule="constant"
    )
    report = train_language_model(patient)
    losses = [record["eval_loss"] for record in log_of(patient.out) if "eval_loss" in record]
    assert report["steps"] < 60
    assert len(losses) == losses.index(min(losses)) + 1 + 2
    assert report["step"] == 2 * (losses.index(min(losses)) + 1)
    assert report["validation"]["loss"] == min(losses)
    best = patient.out / "checkpoints" / f"checkpoint-{report['step']}" / "model.safetensors"
    assert weights_of(patient.out) == best.read_bytes()


def test_a_trained_model_is_the_beginning_of_another(finished, tmp_path) -> None:
    reference, report = finished
    sizes = dict.fromkeys(("layers", "width", "heads", "kv_heads", "ff"))
    tuned = replace(reference, out=tmp_path / "run", model=reference.out / "model", lr=1e-4, **sizes)
    again = train_language_model(tuned)
    assert again["validation"]["loss"] < report["validation"]["loss"]


def test_bfloat16_trains(options) -> None:
    full = train_language_model(options)
    half = train_language_model(replace(options, out=options.out.parent / "half", bf16=True))
    assert half["validation"]["loss"] == pytest.approx(full["validation"]["loss"], abs=0.05)
    assert half["validation"]["loss"] != full["validation"]["loss"]


def test_weight_decay_spares_what_is_no_matrix(options) -> None:
    from neural_layers.models.hybrid import HybridConfig, HybridForCausalLM

    model = HybridForCausalLM(HybridConfig.preset("tiny", num_hidden_layers=2, mixers=["mamba", "mamba2"]))
    decayed = LanguageModelTrainer.get_decay_parameter_names(None, model)  # type: ignore[arg-type]
    assert not [name for name in decayed if name.endswith(("A_log", "D", "bias", "norm.weight"))]
    assert "model.embed_tokens.weight" in decayed


def test_an_infinite_loss_stops_the_run_and_keeps_the_last_good_checkpoint(options, monkeypatch) -> None:
    real = LanguageModelTrainer.compute_loss

    def compute_loss(self, *args, **kwargs):
        loss = real(self, *args, **kwargs)
        return loss * float("nan") if self.state.global_step == 5 else loss

    monkeypatch.setattr(LanguageModelTrainer, "compute_loss", compute_loss)
    with pytest.raises(FloatingPointError, match="the loss is nan at step 6 .batch 5.; the last checkpoint in"):
        train_language_model(options)
    newest = newest_checkpoint(options.out / "checkpoints")
    assert newest is not None
    assert newest.step == 4
    monkeypatch.undo()
    train_language_model(options)
    other = replace(options, out=options.out.parent / "other")
    train_language_model(other)
    assert weights_of(options.out) == weights_of(other.out)


def test_an_infinite_gradient_is_found_before_it_reaches_the_weights(options, monkeypatch) -> None:
    real = LanguageModelTrainer.training_step

    def training_step(self, model, *args, **kwargs):
        loss = real(self, model, *args, **kwargs)
        if self.state.global_step == 3:
            next(model.parameters()).grad[0, 0] = float("inf")
        return loss

    monkeypatch.setattr(LanguageModelTrainer, "training_step", training_step)
    with pytest.raises(FloatingPointError, match="norm of the gradient is (inf|nan) at step 4"):
        train_language_model(options)


@pytest.mark.parametrize("where", ["weights", "optimizer"])
def test_a_full_disk_is_an_os_error_and_loses_nothing(options, monkeypatch, where: str) -> None:
    from safetensors import SafetensorError

    real, calls = checkpoints.save_file, []

    def full(*args, **kwargs):
        calls.append(1)
        if len(calls) == 2:
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
        return real(*args, **kwargs)

    if where == "optimizer":
        monkeypatch.setattr(checkpoints, "save_file", full)
    else:
        monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
        real = __import__("safetensors.torch", fromlist=["save_file"]).save_file
    with pytest.raises(OSError, match="No space left"):
        train_language_model(options)
    folder = options.out / "checkpoints"
    assert [path.name for path in folder.iterdir()] == ["checkpoint-2"]
    monkeypatch.undo()
    assert train_language_model(options)["steps"] == 8


def test_the_loss_by_position_falls_where_context_helps(finished) -> None:
    options, _ = finished
    found = evaluate_language_model(
        EvaluationOptions(options.out / "model", str(options.out.parent / "data"), stride=4, cache=options.cache)
    )
    assert [entry["first"] for entry in found["loss_by_position"]] == [1, 2, 4, 8]
    assert sum(entry["tokens"] for entry in found["loss_by_position"]) == found["tokens"]
    assert np.isfinite([entry["loss"] for entry in found["loss_by_position"]]).all()


def test_a_second_run_takes_the_tokens_of_the_first(options, monkeypatch) -> None:
    told: list[str] = []
    monkeypatch.setattr("neural_layers.distill.recipes.language_model.tqdm.write", told.append)
    train_language_model(replace(options, steps=1, save_steps=1))
    train_language_model(replace(options, steps=1, out=options.out.parent / "second"))
    told = [line for line in told if "documents" in line]
    assert "tokens in 1 documents, written to the cache" in told[0]
    assert "tokens in 1 documents, from the cache" in told[1]
