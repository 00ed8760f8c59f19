"""`neural-layers distill ntmm` from end to end: what it writes, that a run is continued to the same bits, its exit."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from neural_layers.distill.trainer import DistillationTrainer
from tests.distill.ntmm_runs import SMALL, distill, plain_report, refused, write_texts

__all__ = ["plain_report"]

_STEPS = "--steps 4 --teacher-steps 24 --eval-steps 2 --teacher-lr 0.01 --lr 0.02 --patience 0"
STEPS = [*SMALL, *_STEPS.split()]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return write_texts(tmp_path_factory.mktemp("data"))


@pytest.fixture(scope="module")
def run(data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "first"
    options = ["--imbalance", "weights", "--augment", "--mse", "0.05", "--baseline", "--compress", "bf16"]
    assert distill("--data", data, "--out", out, *STEPS, *options, "--min-retention", 0) == 0
    return out


def report_of(run: Path) -> dict:
    return json.loads((run / "report.json").read_text())


def test_the_run_folder_holds_what_the_design_says(run) -> None:
    names = {entry.name for entry in run.iterdir()}
    assert names == {
        *("config.json", "train_log.jsonl", "tensorboard", "validation", "checkpoints", "report.html", "report.json"),
        *("tokenizer", "teacher", "student", "baseline", "compressed"),
    }
    assert {"step-2.json", "step-4.json", "teacher", "baseline"} <= {e.name for e in (run / "validation").iterdir()}
    assert not list(run.rglob("*.part"))
    config = json.loads((run / "config.json").read_text())
    assert config["options"]["mse"] == 0.05
    assert {"torch", "transformers", "neural_layers", "python"} <= set(config["versions"])


def test_the_report_has_every_part_and_the_scores_are_those_of_the_saved_models(run, data) -> None:
    report = report_of(run)
    assert report["task"] == "classification"
    assert set(report["models"]) == {"teacher", "student", "baseline"}
    assert report["classes"]["labels"] == ["lung", "pain", "skin"]
    assert sum(map(sum, report["classes"]["confusion"]["student"])) == report["data"]["test"] == 24
    assert [entry["step"] for entry in report["validation"]["student"]] == [2, 4]
    assert report["gate"]["passed"] is True
    assert report["rollbacks"] == []
    assert [form["variant"] for form in report["compression"]] == ["student", "bf16"]
    rows = [json.loads(line) for line in (data / "test.jsonl").read_text().splitlines()]
    for name in ("teacher", "student", "baseline"):
        tokenizer = AutoTokenizer.from_pretrained(run / name)
        model = AutoModelForSequenceClassification.from_pretrained(run / name).eval()
        right = 0
        for row in rows:  # one by one: no padding
            with torch.no_grad():
                chosen = int(model(**tokenizer(row["text"], return_tensors="pt", truncation=True)).logits.argmax())
            right += model.config.id2label[chosen] == row["label"]
        assert report["models"][name]["quality"]["accuracy"] == pytest.approx(right / len(rows), abs=1e-6)
    teacher, student = (report["models"][name]["quality"] for name in ("teacher", "student"))
    assert report["retention"]["macro_f1"] == pytest.approx(student["macro_f1"] / teacher["macro_f1"], abs=1e-5)


def test_the_log_has_the_parts_of_the_loss(run) -> None:
    log = [json.loads(line) for line in (run / "train_log.jsonl").read_text().splitlines()]
    student = [line for line in log if line["model"] == "student" and "loss" in line]
    assert [line["step"] for line in student] == [1, 2, 3, 4]
    for line in student:
        parts = 0.5 * (line["kl"] + 0.1 * line["cosine"] + 0.05 * line["mse"]) + 0.5 * line["hard"]
        assert line["loss"] == pytest.approx(parts, rel=1e-4)
    assert all("kl" not in line for line in log if line["model"] == "baseline")


def test_a_finished_run_is_told_again_and_one_with_other_options_is_refused(run, data, capsys) -> None:
    options = ["--imbalance", "weights", "--augment", "--mse", "0.05", "--baseline", "--compress", "bf16"]
    before = report_of(run)
    assert distill("--data", data, "--out", run, *STEPS, *options, "--min-retention", 0) == 0
    assert report_of(run) == before
    assert "is finished" in capsys.readouterr().out
    said = refused(capsys, "--data", data, "--out", run, *STEPS, *options, "--min-retention", 0, "--cosine", 0.2)
    assert "--cosine was 0.1 when the run" in said


@pytest.mark.parametrize(("name", "at"), [("teacher", 7), ("student", 3)])
def test_a_run_that_is_cut_off_ends_with_the_same_bits(data, tmp_path, plain_report, monkeypatch, name, at) -> None:
    options = ["--data", data, *STEPS, "--augment", "--imbalance", "sampling", "--teacher-steps", 8]
    options += ["--min-retention", 0]
    assert distill(*options, "--out", tmp_path / "whole") == 0
    original = DistillationTrainer.training_step

    def cut(self, *args, **kwargs):
        if self.state.global_step == at and Path(self.args.output_dir).name == name:
            raise KeyboardInterrupt
        return original(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(DistillationTrainer, "training_step", cut)
        assert distill(*options, "--out", tmp_path / "cut") == 130
    assert not (tmp_path / "cut" / "student").exists()
    assert distill(*options, "--out", tmp_path / "cut", "--resume") == 0
    for model in ("teacher", "student"):
        ours, theirs = (load_file(tmp_path / run / model / "model.safetensors") for run in ("whole", "cut"))
        assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    one, other = (report_of(tmp_path / run) for run in ("whole", "cut"))
    assert one["validation"] == other["validation"]
    assert one["classes"] == other["classes"]
    logs = [(tmp_path / run / "train_log.jsonl").read_text() for run in ("whole", "cut")]
    timeless = [re.sub(r'"(train_)?(runtime|\w+_per_second|loss)": [^,}]+', "", log) for log in logs]
    assert timeless[0].count("\n") == timeless[1].count("\n")


def test_a_student_that_keeps_too_little_exits_with_3_and_names_the_metric(
    run, data, tmp_path, plain_report, capsys
) -> None:
    options = ["--data", data, "--teacher", run / "teacher", *[o for o in SMALL if o not in ("--tokenizer", "bpe:280")]]
    assert report_of(run)["models"]["teacher"]["quality"]["accuracy"] > 0.5  # the control: there is something to lose
    assert distill(*options, "--out", tmp_path / "poor", "--steps", 1, "--lr", 1e-9) == 3
    assert "failed by accuracy" in " ".join(capsys.readouterr().out.split())
    gate = report_of(tmp_path / "poor")["gate"]
    assert gate["passed"] is False
    assert "accuracy" in gate["failed"]
    assert gate["retention"] < 0.9


def test_the_rate_test_writes_its_plots_and_the_run_goes_on_from_there(
    run, data, tmp_path, plain_report, capsys
) -> None:
    options = ["--data", data, "--teacher", run / "teacher", *[o for o in SMALL if o not in ("--tokenizer", "bpe:280")]]
    options += ["--steps", 2, "--lr", 0.01, "--min-retention", 0]
    assert distill(*options, "--out", tmp_path / "run", "--find-lr", 10) == 0
    assert "student: the loss falls" in capsys.readouterr().out
    folder = tmp_path / "run" / "learning_rate"
    assert {path.name for path in folder.iterdir()} == {"student.png", "student.svg", "student.json"}
    curve = json.loads((folder / "student.json").read_text())
    assert np.all(np.diff(curve["rates"]) > 0)
    assert distill(*options, "--out", tmp_path / "run") == 0
    assert distill(*options, "--out", tmp_path / "other") == 0
    ours, theirs = (load_file(tmp_path / name / "student" / "model.safetensors") for name in ("run", "other"))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
