"""`neural-layers distill lm` from end to end: what it writes, that a run is continued to the same bits, its exit."""

import itertools
import json
import math
import os
import signal
from contextlib import nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

from safetensors.torch import load_file
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

from neural_layers.cli import main
from neural_layers.distill.recipes.language_model import train_language_model
from neural_layers.distill.report import write
from neural_layers.distill.text.tokenizing import character_tokenizer
from neural_layers.distill.trainer import DistillationTrainer
from neural_layers.models.hybrid import HybridForCausalLM
from tests.distill.interrupted_runs import in_a_process
from tests.distill.language_runs import small_options, write_corpus

_SMALL = """--context 16 --batch 4 --steps 8 --eval-steps 4 --save-steps 2 --lr 1e-2 --layers 2 --mixers mamba,attention
--width 8 --heads 2 --kv-heads 1 --ff 12 --threads 1 --min-retention 0
--report-to none"""
SEPARATED = ["--document-separator", "king"]  # documents of a few words: borders in nearly every sequence


@pytest.fixture(scope="module")
def root(tmp_path_factory) -> Path:
    """data/, and teacher/ with a hybrid that was trained on it."""
    folder = tmp_path_factory.mktemp("lm")
    write_corpus(folder / "data")
    torch.set_num_threads(1)
    train_language_model(small_options(folder, steps=40, eval_steps=40, save_steps=40))
    (folder / "run" / "model").rename(folder / "teacher")
    return folder


def distill(root: Path, out: str, *changes: Any, teacher: Path | None = None, page: bool = False) -> int:
    """The exit status of the command; later options replace earlier ones. Without `page` the report's is not drawn."""
    given = ["--data", root / "data", "--teacher", teacher or root / "teacher", "--cache", root / "cache"]
    with nullcontext() if page else patch.object(write, "render_report", lambda report: ""):
        return main(["distill", "lm", *map(str, [*given, *_SMALL.split(), "--out", root / out, *changes])])


def refused(capsys: Any, root: Path, *changes: Any, **given: Any) -> str:
    """The one line that a refused command prints; nothing is written."""
    assert distill(root, "refused", *changes, **given) == 2
    said = capsys.readouterr().err
    said = said[said.index("neural-layers: ") :]  # behind the bars of what was read
    assert said.count("\n") == 1
    assert not (root / "refused").exists()
    return str(said)


def report_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "report.json").read_text())


def weights_of(run: Path, name: str = "student") -> dict[str, torch.Tensor]:
    return load_file(run / name / "model.safetensors")


@pytest.fixture(scope="module")
def run(root) -> Path:
    options = ["--baseline", "--compress", "bf16,nf4", "--cosine", "0.1", "--states", "uniform", "--temperature", "3:1"]
    options += ["--report-to", "tensorboard", "--statistics", 4]
    assert distill(root, "first", *options, *SEPARATED, page=True) == 0
    return root / "first"


def test_the_run_folder_and_the_report_have_every_part(run) -> None:
    assert {entry.name for entry in run.iterdir()} == {
        *("config.json", "train_log.jsonl", "validation", "checkpoints", "report.html", "report.json"),
        *("student", "baseline", "compressed", "tensorboard"),
    }
    report = report_of(run)
    assert report["task"] == "language"
    assert set(report["models"]) == {"teacher", "student", "baseline"}
    assert [entry["step"] for entry in report["validation"]["student"]] == [4, 8]
    teacher = json.loads((run / "validation" / "teacher.json").read_text())["windows"]
    loss = sum(nats for nats, _ in teacher) / sum(tokens for _, tokens in teacher)
    assert report["validation"]["teacher"][0]["loss"] == pytest.approx(loss, abs=1e-6)
    assert [form["variant"] for form in report["compression"]] == ["student", "bf16", "nf4"]
    assert report["rollbacks"] == []
    for line in report["training_log"]["student"]:
        parts = 0.5 * (line["kl"] + 0.1 * line["cosine"]) + 0.5 * line["hard"]
        assert line["loss"] == pytest.approx(parts, rel=1e-4)
    assert all("kl" not in line for line in report["training_log"]["baseline"])
    page = (run / "report.html").read_text()
    for said in ("bits per byte", "perplexity", "lower is better", "sequence"):
        assert said in page
    assert not any(word in page for word in ("BLEU", "accuracy", "chrF"))


@torch.no_grad()
def test_the_scores_are_those_of_the_saved_models_token_by_token(root, run) -> None:
    text = (root / "data" / "valid.txt").read_text()
    tokenizer = AutoTokenizer.from_pretrained(run / "student")
    pieces = [piece for piece in text.split("king") if piece.strip()]  # white space alone is no document
    stream, starts = [], []
    for piece in pieces:
        starts.append(len(stream))
        stream += [*tokenizer(piece, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
    report = report_of(run)
    for name, folder in (("teacher", root / "teacher"), ("student", run / "student")):
        model = HybridForCausalLM.from_pretrained(folder).double().eval()
        nats, count = 0.0, 0
        for begin in range(0, len(stream), 15):  # windows of 16 that overlap by one token
            cuts = sorted({begin, min(begin + 16, len(stream)), *(s for s in starts if begin < s < begin + 16)})
            for a, b in itertools.pairwise(cuts):
                ids = torch.tensor([stream[a:b]])
                log_p = model(ids).logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])
                nats, count = nats - float(log_p.sum()), count + b - a - 1
        quality = report["models"][name]["quality"]
        assert quality["loss"] == pytest.approx(nats / count, abs=2e-6)
        assert quality["perplexity"] == pytest.approx(math.exp(nats / count), abs=1e-4)
        size = sum(len(piece.encode()) for piece in pieces)
        bits = (nats + len(pieces) * math.log(model.config.vocab_size)) / math.log(2) / size
        assert quality["bits_per_byte"] == pytest.approx(bits, abs=1e-5)
    ratio = report["models"]["teacher"]["quality"]["loss"] / report["models"]["student"]["quality"]["loss"]
    assert report["retention"]["loss"] == pytest.approx(ratio, abs=1e-5)


@pytest.fixture(scope="module")
def whole(root) -> Path:
    assert distill(root, "whole", *SEPARATED, "--dropout", "0.1") == 0
    return root / "whole"


def test_a_run_that_is_killed_ends_with_the_same_bits(root, whole) -> None:
    def killed() -> None:
        original = DistillationTrainer.training_step

        def cut(self, *args, **kwargs):
            if self.state.global_step == 5:
                os.kill(os.getpid(), signal.SIGKILL)
            return original(self, *args, **kwargs)

        DistillationTrainer.training_step = cut
        distill(root, "cut", *SEPARATED, "--dropout", "0.1")

    assert in_a_process(killed) == signal.SIGKILL
    assert not (root / "cut" / "student").exists()
    assert distill(root, "cut", *SEPARATED, "--dropout", "0.1", "--resume") == 0
    ours, theirs = weights_of(root / "cut"), weights_of(whole)
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)
    one, other = report_of(root / "cut"), report_of(whole)
    assert one["validation"] == other["validation"]
    assert one["models"]["student"]["quality"] == other["models"]["student"]["quality"]


def test_a_cache_of_the_whole_vocabulary_trains_as_the_teacher_does(root, whole, capsys) -> None:
    cached = [*SEPARATED, "--dropout", "0.1", "--teacher-cache", root / "kept", "--top-k", 999]
    assert distill(root, "cached", *cached) == 0
    assert "teacher cache: the 19 largest of 19 logits" in capsys.readouterr().out
    one, other = (report_of(path)["training_log"]["student"] for path in (whole, root / "cached"))
    assert len(one) == len(other) == 8
    for ours, theirs in zip(one, other, strict=True):
        for part in ("loss", "kl", "hard"):  # the cache keeps logits in float16
            assert ours[part] == pytest.approx(theirs[part], rel=2e-3)
    theirs = weights_of(root / "cached")
    for name, ours in weights_of(whole).items():
        torch.testing.assert_close(ours, theirs[name], rtol=0.05, atol=5e-3)
    said = refused(capsys, root, *cached, "--seed", 1)
    assert "was built with data=" in said


def test_a_transformers_teacher_with_a_padded_vocabulary_teaches(root, tmp_path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(root / "teacher")
    torch.manual_seed(0)
    sizes = {"hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer) + 5, num_key_value_heads=1, **sizes))
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    assert distill(root, "llama", *SEPARATED, teacher=tmp_path) == 0
    report = report_of(root / "llama")
    assert report["models"]["teacher"]["architecture"] == "LlamaForCausalLM"
    assert len(weights_of(root / "llama")["model.embed_tokens.weight"]) == len(tokenizer) + 5
    # An untrained teacher knows nothing: it is near the uniform distribution over its vocabulary.
    assert report["models"]["teacher"]["quality"]["loss"] == pytest.approx(np.log(len(tokenizer) + 5), abs=0.2)


def test_a_student_that_keeps_too_little_exits_with_3_and_names_the_metric(root, capsys) -> None:
    train = root / "data" / "train.txt"
    assert distill(root, "poor", "--valid", train, "--steps", 1, "--lr", 1e-9, "--min-retention", 0.9) == 3
    said = capsys.readouterr().out
    assert "failed by loss and bits per byte (90% asked for)" in " ".join(said.split())
    assert "warning: the validation text is the training text" in said
    gate = report_of(root / "poor")["gate"]
    assert gate["passed"] is False
    assert gate["failed"] == ["loss", "bits_per_byte"]


def test_a_finished_run_is_told_again_and_a_student_from_a_folder_goes_on(root, run, capsys) -> None:
    assert distill(root, "on", "--student", run / "student", "--layers", 2) == 2
    assert "--layers 2 changes the model of --student" in capsys.readouterr().err
    plain = ["--context", 16, "--batch", 4, "--steps", 4, "--eval-steps", 4, "--threads", 1, "--min-retention", 0]
    given = ["--data", root / "data", "--teacher", root / "teacher", "--cache", root / "cache"]
    command = ["distill", "lm", *map(str, [*given, *plain, "--student", run / "student", "--out", root / "on"])]
    assert main(command) == 0
    before = report_of(root / "on")
    losses = [entry["loss"] for entry in before["validation"]["student"]]
    assert losses[0] < report_of(run)["validation"]["student"][0]["loss"]
    assert main(command) == 0
    assert "is finished" in capsys.readouterr().out
    assert report_of(root / "on") == before
    assert main([*command, "--alpha", "0.4"]) == 2
    assert "--alpha was 0.5 when the run" in capsys.readouterr().err


WRONG = {
    "validation": (["--valid-fraction", "2"], "--valid-fraction 2.0 must lie between 0 and 1"),
    "temperature": (["--temperature", "0"], "--temperature 0 must be positive"),
    "schedule": (["--alpha", "1:x"], "--alpha: '1:x' is no schedule"),
    "no teacher": (["--alpha", "0"], "neural-layers train needs none"),
    "divergence": (["--divergence", "side"], "--divergence side must be one of forward, reverse, jsd"),
    "states": (["--cosine", "1", "--states", "first"], "--states first must be one of last, uniform"),
    "threshold": (["--min-retention", "1.5"], "min_retention=1.5 must lie in [0, 1]"),
    "saving": (["--save-steps", "3"], "--eval-steps 4 must be a multiple of --save-steps 3"),
    "context": (["--context", "32", "--max-context", "32"], "longer than the 16 tokens that the teacher in"),
    "forms": (["--compress", "int3"], "no compressed form 'int3'"),
    "cached stream": (["--teacher-cache", "kept", "--streaming"], "--teacher-cache does not go with --streaming"),
    "cached states": (["--teacher-cache", "kept", "--cosine", "1"], "--teacher-cache does not hold"),
    "cached schedule": (["--teacher-cache", "kept", "--temperature", "3:1"], "--teacher-cache is made for one"),
    "teacher": (["--teacher", "nowhere"], "there is no folder nowhere"),
    "resume": (["--resume"], "holds no run to resume"),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_input_is_told_in_one_line(root, capsys, case) -> None:
    changes, expected = WRONG[case]
    assert expected in refused(capsys, root, *changes)


def test_a_teacher_with_another_tokenizer_is_refused_by_name(root, run, tmp_path, capsys) -> None:
    HybridForCausalLM.from_pretrained(run / "student").save_pretrained(tmp_path)
    character_tokenizer(["another alphabet"]).save_pretrained(tmp_path)
    given = ["--data", root / "data", "--teacher", root / "teacher", "--student", tmp_path, "--out", root / "refused"]
    assert main(["distill", "lm", *map(str, given)]) == 2
    said = capsys.readouterr().err
    assert str(tmp_path) in said
    assert str(root / "teacher") in said
    assert "another tokenizer" in said


def test_a_validation_text_is_asked_for(root, capsys) -> None:
    given = ["--teacher", root / "teacher", "--data", root / "data" / "train.txt", "--out", root / "refused"]
    assert main(["distill", "lm", *map(str, given)]) == 2
    assert "no validation text for the gate; give one with --valid" in capsys.readouterr().err
