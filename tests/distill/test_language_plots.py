"""The pictures of language model runs show what the logs hold."""

import json

import pytest

from neural_layers.distill.report.language_plots import contexts_plot, losses_plot, main, positions_plot


@pytest.fixture
def run(tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps({"options": {"batch": 2, "accumulate": 3, "context": 10}}))
    records = [
        {"step": 10, "loss": 3.0, "tokens_per_second": 5.0},  # 10 steps of 60 tokens: 2 minutes
        {"step": 10, "eval_loss": 2.5},
        {"step": 20, "loss": 2.0, "tokens_per_second": 10.0},  # and 1 more
        {"step": 20, "eval_loss": 2.0},
    ]
    (folder / "train_log.jsonl").write_text("\n".join(map(json.dumps, records)))
    return folder


def test_losses_stand_against_steps_and_minutes(run) -> None:
    upper, lower = losses_plot({"hybrid": run, "other": run}).axes
    assert upper.lines[0].get_xydata().tolist() == [[10, 2.5], [20, 2.0]]
    assert lower.lines[0].get_xydata().tolist() == [[2.0, 2.5], [3.0, 2.0]]
    assert [text.get_text() for text in upper.texts] == ["hybrid 2.00", "other 2.00"]


def test_losses_by_position(tmp_path) -> None:
    rows = [{"first": 1, "last": 1, "loss": 3.0, "tokens": 4}, {"first": 2, "last": 3, "loss": 2.0, "tokens": 8}]
    (tmp_path / "e.json").write_text(json.dumps({"loss_by_position": rows}))
    (axes,) = positions_plot({"context 4": tmp_path / "e.json"}).axes
    assert axes.lines[0].get_xydata().tolist() == [[1, 3.0], [2, 2.0]]


def test_losses_by_context_are_ordered(tmp_path) -> None:
    for context, loss in ((64, 2.0), (16, 3.0)):
        (tmp_path / f"c{context}.json").write_text(json.dumps({"context": context, "loss": loss}))
    (axes,) = contexts_plot({"model": tmp_path / "c*.json"}).axes
    assert axes.lines[0].get_xydata().tolist() == [[16, 3.0], [64, 2.0]]


def test_command_writes_a_picture_and_refuses_more_lines_than_can_be_told_apart(run, tmp_path, capsys) -> None:
    picture = tmp_path / "losses.png"
    assert main(["losses", f"a={run}", "--out", str(picture)]) == 0
    assert picture.read_bytes()[:4] == b"\x89PNG"
    with pytest.raises(SystemExit):
        main(["losses", *[f"{i}={run}" for i in range(6)], "--out", str(picture)])
    assert "6 lines are more than the 5" in capsys.readouterr().err
