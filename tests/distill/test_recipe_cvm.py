"""`neural-layers distill cvm` from end to end on a handful of sentences, and what it answers to bad input."""

import json
import shutil
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="transformers is not installed")

import torch

from neural_layers.cli import main
from neural_layers.cli.distill_shared import DEGRADED
from neural_layers.distill.recipes import comparison
from neural_layers.models.cvm import CVMConfig, CVMForConditionalGeneration

SCORES = {"bleu", "chrf", "ter", "rouge1", "rouge2", "rougeL", "exact_match", "length_ratio"}
WORDS = {"the": "der", "dog": "Hund", "man": "Mann", "sees": "sieht", "hears": "hört", "old": "alte", "young": "junge"}


def write_pairs(path: Path, start: int, count: int) -> Path:
    """Distinct word-for-word sentences."""
    lines = []
    for i in range(start, start + count):
        words = ["the", ["old", "young"][i % 2], ["dog", "man"][i // 2 % 2], ["sees", "hears"][i // 4 % 2], "the"]
        words += [["old", "young"][i // 8 % 2], ["dog", "man"][i // 16 % 2]]
        lines.append(" ".join(words) + f" {i}\t" + " ".join(WORDS[word] for word in words) + f" {i}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module", autouse=True)
def _few_are_timed():
    """Models of a few steps translate slowly, because they do not know when to stop."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(comparison, "_TIMED", 1)
        patch.setattr(comparison, "_BATCHED", 1)
        yield


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("data")
    sizes = {"data": (0, 24), "valid": (24, 4), "test": (28, 4)}
    files = {name: write_pairs(folder / f"{name}.tsv", *size) for name, size in sizes.items()}
    return [argument for name, path in files.items() for argument in (f"--{name}", str(path))]


@pytest.fixture(scope="module")
def run(data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "first"
    arguments = ["--steps", "2", "--teacher-steps", "3", "--baseline", "--samples", "50", "--compress", "nf4"]
    assert main(["distill", "cvm", "--out", str(out), *data, *arguments]) == DEGRADED
    return out


def refused(capsys, *arguments: str) -> str:
    """The one line that a refused command prints."""
    assert main(["distill", "cvm", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.err.startswith("neural-layers: ")
    assert captured.err.count("\n") == 1
    return captured.err


def test_the_run_folder_holds_what_the_design_says(run) -> None:
    names = {entry.name for entry in run.iterdir()}
    assert names == {
        *("config.json", "train_log.jsonl", "validation", "checkpoints", "report.html", "report.json"),
        *("tokenizer", "teacher", "student", "baseline", "compressed", "tensorboard"),
    }
    assert not [path for path in run.rglob("*") if path.suffix in (".bin", ".pt", ".pth", ".pkl")]
    for model in ("teacher", "student", "baseline"):
        files = {file.name for file in (run / model).iterdir()}
        assert {"model.safetensors", "config.json", "tokenizer.json"} <= files
    assert not list(run.rglob("*.part"))


def test_config_holds_every_hyperparameter_and_the_versions(run) -> None:
    config = json.loads((run / "config.json").read_text())
    assert config["options"]["steps"] == 2
    assert config["hyperparameters"]["student_training"]["steps"] == 2
    assert config["hyperparameters"]["teacher_training"]["steps"] == 3
    assert {"temperature", "alpha", "beta", "vocab_size", "student", "teacher"} <= set(config["hyperparameters"])
    assert {"torch", "transformers", "neural_layers", "python"} <= set(config["versions"])


def test_log_has_the_parts_of_the_loss_and_the_validations_of_each_model(run) -> None:
    log = [json.loads(line) for line in (run / "train_log.jsonl").read_text().splitlines()]
    student = [line for line in log if line["model"] == "student" and "loss" in line]
    assert [line["step"] for line in student] == [1, 2]
    for line in student:
        assert line["loss"] == pytest.approx(0.8 * line["kl"] + 0.2 * line["hard"], rel=1e-4)
    assert {line["model"] for line in log if "eval_bleu" in line} == {"teacher", "student", "baseline"}


def test_validations_show_student_and_teacher_side_by_side(run) -> None:
    record = json.loads((run / "validation" / "step-2.json").read_text())
    assert set(record["model"]) == set(record["teacher"]) == SCORES
    assert len(record["worst"]) == len(record["translations"]) == 4
    assert set(record["analysis"]) == {"by_length", "rare", "copies", "repetitions", "empty"}
    assert record["bertscore"] == "left out: no encoder folder was given (--bertscore DIR)"
    assert "teacher" not in json.loads((run / "validation" / "teacher" / "step-2.json").read_text())
    assert {path.name for path in (run / "validation" / "teacher").glob("step-*")} == {"step-2.json", "step-3.json"}


def test_report_agrees_with_the_models_in_the_folder(run) -> None:
    report = json.loads((run / "report.json").read_text())
    assert report["data"] == {"name": report["data"]["name"], "train": 24, "valid": 4, "test": 4}
    for name in ("teacher", "student", "baseline"):
        model = CVMForConditionalGeneration.from_pretrained(run / name)
        entry = report["models"][name]
        assert entry["parameters"] == sum(p.numel() for p in model.parameters())
        assert entry["file_bytes"] == (run / name / "model.safetensors").stat().st_size
        assert entry["latency_ms"]["p99"] >= entry["latency_ms"]["p95"] >= entry["latency_ms"]["p50"] > 0
        assert entry["throughput"] > 0
        assert set(entry["quality"]) == SCORES
    # A model of two steps says nothing that could be kept.
    assert "bleu" in report["gate"]["failed"]
    assert not report["gate"]["passed"]
    assert report["rollbacks"] == []
    assert [entry["variant"] for entry in report["compression"]] == ["student", "nf4"]
    assert "<svg" in (run / "report.html").read_text()


def test_a_teacher_that_is_given_is_not_trained_again(run, data, tmp_path, capsys) -> None:
    out = tmp_path / "second"
    before = (run / "teacher" / "model.safetensors").read_bytes()
    arguments = ["--out", str(out), *data, "--steps", "1", "--teacher", str(run / "teacher")]
    assert main(["distill", "cvm", *arguments]) == DEGRADED
    assert "report.html" in capsys.readouterr().out
    assert not (out / "teacher").exists()
    assert (run / "teacher" / "model.safetensors").read_bytes() == before
    report = json.loads((out / "report.json").read_text())
    assert report["models"]["teacher"]["training"] is None
    validated = json.loads((out / "validation" / "step-1.json").read_text())["teacher"]
    assert report["validation"]["teacher"] == [{"step": 1, **validated}]
    assert report["models"]["teacher"]["file_bytes"] == len(before)


def test_a_run_that_is_taken_up_again_ends_as_the_one_that_nobody_disturbed(run, data, tmp_path, capsys) -> None:
    """Everything from the second checkpoint on is taken away; what is left is a run that was killed there."""
    out = tmp_path / "again"
    shutil.copytree(run, out)
    before = {path.relative_to(run): path.read_bytes() for path in run.rglob("*") if path.is_file()}
    for name in ("student", "baseline", "compressed"):
        shutil.rmtree(out / name)
    for path in (out / "report.json", out / "report.html", out / "validation" / "step-2.json"):
        path.unlink()
    shutil.rmtree(out / "checkpoints" / "student" / "checkpoint-2")
    shutil.rmtree(out / "checkpoints" / "baseline")
    (out / "checkpoints" / "student" / ".checkpoint-2.123.part").mkdir()
    (out / "validation" / ".teacher.json.123.part").write_text("{")
    arguments = ["--steps", "2", "--teacher-steps", "3", "--baseline", "--samples", "50", "--compress", "nf4"]
    assert main(["distill", "cvm", "--out", str(out), *data, *arguments, "--resume"]) == DEGRADED
    after = {path.relative_to(out): path.read_bytes() for path in out.rglob("*") if path.is_file()}
    is_event = lambda path: path.parts[0] == "tensorboard"  # noqa: E731
    assert {p for p in after if not is_event(p)} == {p for p in before if not is_event(p)}
    for path, content in before.items():
        if path.name in ("model.safetensors", "optimizer.safetensors") or path.match("validation/**/*.json"):
            assert after[path] == content, path
    # Finished, it is left alone and told.
    modified = {path: path.stat().st_mtime_ns for path in out.rglob("*")}
    assert main(["distill", "cvm", "--out", str(out), *data, *arguments]) == DEGRADED
    assert modified == {path: path.stat().st_mtime_ns for path in out.rglob("*")}


def test_an_output_folder_with_another_run_is_left_alone(run, data, tmp_path, capsys) -> None:
    before = {file: file.stat().st_mtime_ns for file in run.rglob("*")}
    assert "--steps was 2 when the run" in refused(capsys, "--out", str(run), *data)
    assert before == {file: file.stat().st_mtime_ns for file in run.rglob("*")}
    (tmp_path / "thesis.tex").write_text("x")
    assert "is not empty (thesis.tex)" in refused(capsys, "--out", str(tmp_path), *data)
    assert "no run to resume" in refused(capsys, "--out", str(tmp_path / "new"), *data, "--resume")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--max-drop", "1.5"], "max_drop=1.5 must lie between 0 and 1"),
        (["--min-retention", "90"], "min_retention=90.0 must lie in"),
        (["--temperature", "hot"], "'hot' is no schedule"),
        (["--metric", "rouge"], "--metric rouge must be one of bleu, chrf"),
        (["--divergence", "l2"], "--divergence l2 must be one of forward, reverse, jsd"),
        (["--eval-steps", "2", "--save-steps", "3", "--steps", "6"], "--save-steps 3 must divide --eval-steps 2"),
        (["--warmup", "9", "--steps", "6"], "--warmup 9 is more than the 6 steps"),
        (["--temperature", "0"], "temperature=0.0 must be positive"),
        (["--alpha", "0", "--beta", "0"], "every part of the loss is turned off"),
        (["--alpha=-1"], "alpha=-1.0 must"),
        (["--teacher-cache", "x", "--temperature", "6:2"], "--teacher-cache is of one temperature"),
        (["--teacher-cache", "x", "--mse", "1"], "--mse compares what --teacher-cache does not keep"),
        (["--bertscore", "missing"], "missing: no config.json"),
        (["--top-k", "8"], "--top-k is of --teacher-cache"),
        (["--bertscore-layers", "2"], "--bertscore-layers are of the encoder"),
        (["--compress", "int3"], "there is no compressed form 'int3'"),
        (["--precision", "fp16"], "--precision fp16 needs a GPU"),
        (["--report-to", "paper"], "paper"),
        (["--threads", "0"], "--threads 0 must be at least 1"),
    ],
)
def test_options_that_cannot_be_are_named(arguments, message, data, tmp_path, capsys) -> None:
    if "fp16" in arguments and torch.cuda.is_available():
        pytest.skip("there is a GPU, which takes float16")
    assert message in refused(capsys, "--out", str(tmp_path / "out"), *data, *arguments)
    assert not (tmp_path / "out").exists()


def test_data_that_changed_under_a_run_is_refused(run, data, tmp_path, capsys) -> None:
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "report.json").unlink()
    files = dict(zip(data[::2], data[1::2], strict=True))
    for name, path in files.items():
        changed = tmp_path / f"{name[2:]}.tsv"
        changed.write_text(Path(path).read_text().replace("young", "youth"))
        files[name] = str(changed)
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    config["options"] |= {name[2:]: path for name, path in files.items()}
    config["data"]["name"] = files["--data"]
    (tmp_path / "run" / "config.json").write_text(json.dumps(config))
    given = [argument for pair in files.items() for argument in pair]
    arguments = ["--steps", "2", "--teacher-steps", "3", "--baseline", "--samples", "50", "--compress", "nf4"]
    assert "the data has changed" in refused(capsys, "--out", str(tmp_path / "run"), *given, *arguments)


def test_several_processes_are_refused(data, tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert "runs in one process and torchrun started 2" in refused(capsys, "--out", str(tmp_path / "out"), *data)


def test_validation_pairs_that_training_has_are_told(data, tmp_path, capsys) -> None:
    files = dict(zip(data[::2], data[1::2], strict=True))
    arguments = ["--data", files["--data"], "--valid", files["--data"], "--test", files["--test"]]
    arguments += ["--steps", "1", "--samples", "10", "--out", str(tmp_path / "out")]
    assert main(["distill", "cvm", *arguments]) == DEGRADED
    assert "warning: the validation data is the training data (24 texts)" in capsys.readouterr().out


def test_the_teacher_cache_is_made_once_and_trained_from(run, data, tmp_path, capsys) -> None:
    teacher, cache = ["--teacher", str(run / "teacher")], ["--teacher-cache", str(tmp_path / "cache")]
    arguments = [*data, *teacher, "--steps", "2", "--samples", "10", "--lr", "1e-3"]
    divergences = []
    for out, more in (("exact", []), ("cached", [*cache, "--top-k", "5000"])):
        assert main(["distill", "cvm", "--out", str(tmp_path / out), *arguments, *more]) == DEGRADED
        log = [json.loads(line) for line in (tmp_path / out / "train_log.jsonl").read_text().splitlines()]
        divergences.append([line["kl"] for line in log if "kl" in line])
    capsys.readouterr()
    assert main(["distill", "cvm", "--out", str(tmp_path / "other"), *arguments, *cache]) == 2
    assert "was built with k=333, and k=64 is wanted" in capsys.readouterr().err
    assert divergences[0] == pytest.approx(divergences[1], rel=2e-3)  # all logits are kept, in half precision


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"", "the file is empty"),
        (b"one\teins\nno tab here\n", "line 2: 0 tabs instead of one: 'no tab here'"),
        (b"one\teins\ntwo\t\n", "line 2: the target is empty"),
        (b"one\teins\ntwo\tz\xf6lf\n", "line 2: not UTF-8"),
    ],
)
def test_bad_data_files_are_named_with_the_line(content, message, data, tmp_path, capsys) -> None:
    path = tmp_path / "bad.tsv"
    if content is not None:
        path.write_bytes(content)
    out = tmp_path / "out"
    printed = refused(capsys, "--out", str(out), "--data", str(path), *data[2:])
    assert str(path) in printed
    assert message in printed
    assert not out.exists()


def spoil_vocabulary(folder: Path) -> None:
    CVMForConditionalGeneration(
        CVMConfig(vocab_size=300, hidden_size=8, num_attention_heads=2, num_hidden_layers=1)
    ).save_pretrained(folder)


def truncate(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])


def edit(path: Path, **changes) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def make_foreign(folder: Path) -> None:
    edit(folder / "config.json", num_hidden_layers=5)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (spoil_vocabulary, "a vocabulary of 300 and its tokenizer"),
        (truncate, "cannot be read"),
        (make_foreign, "not those of a CVM model of its config.json"),
        (lambda folder: (folder / "config.json").unlink(), "holds no config.json"),
        (lambda folder: (folder / "tokenizer.json").write_text("{"), "the tokenizer in"),
        (
            lambda folder: edit(folder / "config.json", hidden_size="wide"),
            "hidden_size='wide' must be a positive integer",
        ),
        (lambda folder: edit(folder / "config.json", max_position_embeddings=16), "takes 16 tokens, and preset 'tiny'"),
        (lambda folder: edit(folder / "tokenizer_config.json", pad_token=None), "has no pad_token"),
        (lambda folder: (folder / "tokenizer.json").unlink(), "holds no tokenizer.json"),
    ],
)
def test_a_teacher_that_does_not_fit_is_refused(spoil, message, run, data, tmp_path, capsys) -> None:
    teacher = shutil.copytree(run / "teacher", tmp_path / "teacher")
    spoil(teacher)
    out = tmp_path / "out"
    assert message in refused(capsys, "--out", str(out), *data, "--teacher", str(teacher))
    assert not out.exists()


def test_a_tokenizer_other_than_the_teachers_is_refused(run, data, tmp_path, capsys) -> None:
    from neural_layers.distill.data.pairs import SentencePair
    from neural_layers.distill.data.tokenizer import train_tokenizer

    train_tokenizer([SentencePair("quite other", "ganz anders")], 270).save_pretrained(tmp_path / "other")
    arguments = ["--teacher", str(run / "teacher"), "--tokenizer", str(tmp_path / "other")]
    assert "differs from the tokenizer of the teacher" in refused(
        capsys, "--out", str(tmp_path / "out"), *data, *arguments
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--preset", "huge"], "no preset 'huge'; there are tiny, small, paper"),
        (["--steps", "0"], "--steps 0 must be at least 1"),
        (["--seed", "-1"], "--seed -1 is out of range"),
        (["--steps", "many"], "--steps: invalid int value: 'many'"),
        (["--colour", "red"], "unrecognized arguments: --colour red"),
        (["--data", "x.tsv"], "--data, --valid and --test go together"),
    ],
)
def test_bad_arguments_are_answered_in_one_line(arguments, message, tmp_path, capsys) -> None:
    out = tmp_path / "out"
    assert message in refused(capsys, "--out", str(out), *arguments)
    assert not out.exists()


def test_paper_preset_is_the_specification() -> None:
    from neural_layers.distill.presets import PRESETS

    paper = PRESETS["paper"]
    for sizes, config in ((paper.teacher, CVMConfig.teacher()), (paper.student, CVMConfig.student())):
        assert all(getattr(config, name) == value for name, value in sizes.items() if name != "dropout")
    training = paper.student_training
    assert (training.steps, training.batch_size, training.learning_rate) == (10_000, 32, 5e-5)
    assert (training.warmup_steps, paper.eval_steps, paper.vocab_size) == (1000, 1000, 32_000)
    assert [str(schedule) for schedule in (paper.temperature, paper.alpha, paper.beta)] == ["6.0", "0.8", "0.2"]
