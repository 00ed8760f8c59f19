"""Trackers are asked for by name, and statistics of gradients and weights change no bit of a training."""

import json
import os
import sys
import types
from pathlib import Path

import pytest
import torch

pytest.importorskip("tensorboard", reason="tensorboard is not installed")

from torch import nn
from transformers import Trainer, TrainingArguments

from neural_layers.cli import main
from neural_layers.distill.recipes.language_model import train_language_model
from neural_layers.distill.tracking import StatisticsCallback, add_statistics, tracker_names, tracking_arguments
from neural_layers.distill.tracking.statistics import group_of
from neural_layers.errors import InputError
from tests.distill.language_runs import log_of, small_options, weights_of, write_corpus


@pytest.fixture(autouse=True)
def _environment(monkeypatch):
    """What a test puts into the environment goes with it."""
    for name in ("TENSORBOARD_LOGGING_DIR", "MLFLOW_TRACKING_URI", "WANDB_MODE", "WANDB_DIR", "WANDB_PROJECT"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    monkeypatch.setattr("neural_layers.distill.tracking.reporting._own", {})
    torch.set_num_threads(1)


def _fake(monkeypatch, name: str, **contents) -> types.ModuleType:
    module = types.ModuleType(name)
    vars(module).update(contents)
    monkeypatch.setitem(sys.modules, name, module)
    return module


def test_a_tracker_that_there_is_not_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(InputError, match="no tracker 'tensorbord'; give none, or .* tensorboard, wandb, mlflow"):
        tracker_names("tensorbord")
    with pytest.raises(InputError, match="no tracker 'none'"):
        tracker_names("none,tensorboard")
    assert tracker_names("none") == ()
    assert tracker_names("tensorboard, tensorboard") == ("tensorboard",)


def test_a_tracker_that_is_not_installed_is_told_with_how_to_install_it(monkeypatch, capsys, tmp_path) -> None:
    monkeypatch.setitem(sys.modules, "mlflow", None)
    write_corpus(tmp_path / "data")
    out = tmp_path / "run"
    assert main(["train", "--data", str(tmp_path / "data"), "--out", str(out), "--report-to", "mlflow"]) == 2
    said = capsys.readouterr().err
    assert said == "neural-layers: --report-to mlflow needs mlflow, which is missing; pip install mlflow\n"
    assert not out.exists()


def test_each_training_has_its_own_folder_and_what_a_person_has_set_stays(monkeypatch, tmp_path) -> None:
    ended = []
    _fake(monkeypatch, "wandb", run=object(), finish=lambda: ended.append("wandb"))
    uris: list[str] = []
    _fake(monkeypatch, "mlflow", set_tracking_uri=uris.append, active_run=lambda: None)
    monkeypatch.setenv("WANDB_MODE", "online")
    names = tracker_names("tensorboard,wandb,mlflow")
    for run in ("a", "b"):
        given = tracking_arguments(names, tmp_path / run, "student")
        assert given == {"report_to": ["tensorboard", "wandb", "mlflow"], "run_name": "student"}
        assert os.environ["TENSORBOARD_LOGGING_DIR"] == str(tmp_path / run / "tensorboard" / "student")
        assert os.environ["WANDB_DIR"] == str(tmp_path / run)
        assert uris[-1].endswith(f"/{run}/mlruns/mlflow.db")
    assert os.environ["WANDB_MODE"] == "online"
    assert ended == ["wandb", "wandb"]
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow.example")
    tracking_arguments(names, tmp_path / "c", "student")
    assert uris[-1] == "http://mlflow.example"
    assert tracking_arguments((), tmp_path / "d", "teacher") == {"report_to": "none", "run_name": "teacher"}
    assert not (tmp_path / "d").exists()


def test_tensorboard_gets_what_the_trainer_logs(tmp_path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _train(tmp_path, every=2, **tracking_arguments(("tensorboard",), tmp_path, "student"))
    events = EventAccumulator(str(tmp_path / "tensorboard" / "student")).Reload()
    assert {"train/loss", "train/grad_norm/head", "train/update_ratio/head"} <= set(events.Tags()["scalars"])
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4]


class _Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.score = nn.Linear(3, 1)
        self.frozen = nn.Linear(3, 1).requires_grad_(False)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": (self.score(x)[:, 0] - y).square().mean()}


def _train(folder: Path, every: int | None, model: nn.Module | None = None, **arguments) -> Trainer:
    data = [{"x": torch.tensor([1.0, i, -i]), "y": torch.tensor(float(i))} for i in range(8)]
    given = {"report_to": "none", "max_steps": 4, "logging_steps": 1, "max_grad_norm": 0.5, "optim": "sgd", **arguments}
    args = TrainingArguments(
        str(folder), learning_rate=0.1, lr_scheduler_type="constant", use_cpu=True, disable_tqdm=True, **given
    )
    trainer = Trainer(model or _Linear(), args, train_dataset=data)  # type: ignore[arg-type]
    add_statistics(trainer, every)
    trainer.train()
    return trainer


def test_statistics_are_the_norms_of_gradients_weights_and_updates(tmp_path) -> None:
    model = _Linear()
    start = torch.cat([p.detach().flatten() for p in model.score.parameters()]).double()
    trainer = _train(tmp_path, 1, model, max_steps=1)
    update = torch.cat([p.detach().flatten() for p in model.score.parameters()]).double() - start
    (logged,) = [entry for entry in trainer.state.log_history if "grad_norm/head" in entry]
    group = "head"
    assert not any("frozen" in name for name in logged)
    # SGD: the update is the rate times the gradient, which was clipped to norm 0.5.
    assert logged[f"grad_norm/{group}"] == pytest.approx(0.5, rel=1e-5)
    assert logged[f"param_norm/{group}"] == pytest.approx(float(start.norm()), rel=1e-6)
    assert logged[f"update_ratio/{group}"] == pytest.approx(float(update.norm() / start.norm()), rel=1e-5)
    assert logged[f"update_ratio/{group}"] == pytest.approx(0.1 * 0.5 / float(start.norm()), rel=1e-4)
    assert logged["step"] == 1


def test_statistics_come_every_so_many_steps_and_take_no_loss_from_the_log(tmp_path) -> None:
    history = _train(tmp_path, 2).state.log_history
    assert [entry["step"] for entry in history if "param_norm/head" in entry] == [2, 4]
    assert [entry["step"] for entry in history if "loss" in entry] == [1, 2, 3, 4]
    with pytest.raises(ValueError, match="every=0"):
        StatisticsCallback(0)


def test_a_training_with_statistics_ends_with_the_same_bits(tmp_path) -> None:
    write_corpus(tmp_path / "data")
    plain = small_options(tmp_path, "plain", steps=4, report_to="none", dropout=0.1)
    watched = small_options(tmp_path, "watched", steps=4, statistics=2, dropout=0.1)
    for options in (plain, watched):
        train_language_model(options)
    assert weights_of(plain.out) == weights_of(watched.out)
    assert not (plain.out / "tensorboard").exists()
    found = [entry for entry in log_of(watched.out) if "grad_norm/mixers" in entry]
    assert [entry["step"] for entry in found] == [2, 4]
    kinds = {name.partition("/")[2] for name in found[0] if "/" in name}
    assert kinds == {"embeddings", "mixers", "feed_forward", "norms"}
    assert all(0 < entry["update_ratio/mixers"] < 1 for entry in found)
    assert json.loads((watched.out / "config.json").read_text())["options"]["statistics"] == 2


@pytest.mark.parametrize(
    ("name", "group"),
    [
        ("model.embed_tokens.weight", "embeddings"),
        ("model.layers.0.mixer.norm.weight", "norms"),
        ("model.layers.11.mixer.inner.in_proj.weight", "mixers"),
        ("model.layers.0.self_attn.q_proj.bias", "mixers"),
        ("decoder.layers.0.cross_attention.inner.k_proj.weight", "mixers"),
        ("model.layers.3.mlp.up_proj.weight", "feed_forward"),
        ("model.layers.0.input_layernorm.weight", "norms"),
        ("score.weight", "head"),
        ("lm_head.weight", "head"),
        ("shared.weight", "embeddings"),
        ("encoder.merge.proj.weight", "encoder.merge.proj"),
        ("a.0.b.1.c.d.weight", "a.b.c"),
        ("gate", "gate"),
    ],
)
def test_groups_of_parameters(name, group) -> None:
    assert group_of(name) == group
