"""A search finds the best options of a recipe, survives kills, and tells what came of each trial."""

import json
import os
import shlex
from functools import partial
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("optuna", reason="optuna is not installed")
pytest.importorskip("matplotlib", reason="matplotlib is not installed")

from neural_layers.cli import main
from neural_layers.distill.search import SearchFailed
from neural_layers.distill.search.results import print_results, write_results
from tests.distill.language_runs import write_corpus
from tests.distill.search_runs import FakeRecipe, in_child, kill, parse, search, tried


def _full_disk() -> None:
    raise OSError("No space left on device")


def _defect() -> None:
    raise KeyError("a defect")


def test_the_best_trial_is_told_with_the_command_that_gives_it_again(tmp_path, capsys) -> None:
    found = search(tmp_path / "s", trials=9)
    found.run(show_bar=False)
    written = write_results(found)
    print_results(found)
    best = json.loads((tmp_path / "s" / "best.json").read_text())
    trials = json.loads((tmp_path / "s" / "trials.json").read_text())
    done = {row["trial"]: row["metrics"]["loss"] for row in trials if row["state"] == "completed"}
    assert best["objective"] == {"name": "loss", "direction": "min", "value": min(done.values())}
    assert done[best["trial"]] == min(done.values())
    assert best["objective"]["value"] < sorted(done.values())[len(done) // 2]
    # The command, read by the recipe and run, gives the same numbers.
    words = shlex.split(best["command"])
    assert words[:2] == ["neural-layers", "fake"]
    again = FakeRecipe().run({**parse(words[2:]), "out": "0"}, "", ())
    assert again["validation"]["loss"] == best["objective"]["value"]
    assert f"again: {best['command']}" in capsys.readouterr().out
    plots = {path.name for path in written if path.parent.name == "plots"}
    assert plots == {"history.png", "history.svg", "importance.png", "importance.svg"}
    assert all(path.stat().st_size > 1000 for path in written if path.name in plots)
    # What a recipe prints is kept beside its run.
    assert (tmp_path / "s" / "trials" / f"{best['trial']}.log").read_text() == f"done {best['trial']}\n"


def test_bad_trials_are_pruned_and_combinations_that_cannot_be_are_failed_and_avoided(tmp_path, capsys) -> None:
    found = search(tmp_path / "s", trials=20)
    found.run(show_bar=False)
    states = [state for state, *_ in tried(found)]
    assert states.count("pruned") >= 1
    assert states.count("failed") >= 1
    for state, parameters, values, validations in tried(found):
        if state == "failed":
            assert parameters["width"] % parameters["heads"]
        else:
            assert parameters["width"] % parameters["heads"] == 0
        assert (
            (max(validations, default=0) == 100) == (state == "completed") == (values is not None and state != "pruned")
        )
    # The pruned were worse than the median at the step where they were given up.
    pruned = [validations for state, _, _, validations in tried(found) if state == "pruned"]
    others = [validations for state, _, _, validations in tried(found) if state == "completed"]
    for validations in pruned:
        step = max(validations)
        assert validations[step] > sorted(v[step] for v in others)[0]
    # The sampler learns from what cannot be.
    assert states[12:].count("failed") <= 2
    said = capsys.readouterr().out
    assert "failed: --width 32 must be a multiple of --heads 3" in said
    assert ": pruned at step " in said


def test_a_search_that_was_killed_goes_on_with_the_same_trials(tmp_path) -> None:
    whole = search(tmp_path / "whole")
    whole.run(show_bar=False)
    victims = [number for number, (state, *_) in enumerate(tried(whole)) if state == "completed"]
    for victim in (victims[0], victims[-1]):
        child = in_child(partial(_run, tmp_path / "cut", FakeRecipe({victim: kill})))
        _, status = os.waitpid(child, 0)
        assert os.WIFSIGNALED(status)
    rest = FakeRecipe()
    resumed = search(tmp_path / "cut", fake=rest)
    assert tried(resumed)[victims[-1]][0] == "running"
    resumed.run(show_bar=False)
    assert tried(resumed) == tried(whole)
    assert rest.ran[0] == victims[-1]  # its run is continued, in the same folder
    assert len(rest.ran) == 12 - victims[-1]


def test_a_trial_whose_process_lives_is_left_to_it_and_one_whose_process_died_is_taken(tmp_path) -> None:
    first, second = search(tmp_path / "s", trials=2), search(tmp_path / "s", trials=2)
    claimed = first.folder.claim(2)
    other = second.folder.claim(2)
    assert claimed is not None
    assert other is not None
    assert (claimed[0].number, other[0].number) == (0, 1)
    assert claimed[0].params != other[0].params
    assert second.folder.claim(2) is None
    claimed[1].release()  # as a process does that dies
    taken = second.folder.claim(2)
    assert taken is not None
    assert (taken[0].number, taken[0].params) == (0, claimed[0].params)


def test_processes_side_by_side_share_the_trials(tmp_path) -> None:
    children = [in_child(lambda: search(tmp_path / "s", trials=8).run(show_bar=False)) for _ in range(2)]
    assert [os.waitpid(child, 0)[1] for child in children] == [0, 0]
    records = tried(search(tmp_path / "s", trials=8))  # opened here: SQLite's connections do not survive a fork
    assert len(records) == 8
    assert not any(state == "running" for state, *_ in records)
    assert len({str(parameters) for _, parameters, *_ in records}) == 8


def test_several_objectives_give_the_pareto_front_and_no_pruning(tmp_path, capsys) -> None:
    found = search(tmp_path / "s", trials=16, objectives=("loss", "parameters:min"))
    found.run()
    written = write_results(found)
    assert "no trial is pruned: there are several objectives" in capsys.readouterr().out
    front = json.loads((tmp_path / "s" / "pareto.json").read_text())["front"]
    points = {row["trial"]: (row["metrics"]["loss"], row["metrics"]["parameters"]) for row in front}
    everything = [values for state, _, values, _ in tried(found) if state == "completed"]
    assert not any(state == "pruned" for state, *_ in tried(found))
    for loss, parameters in points.values():
        assert not any(a <= loss and b <= parameters and (a, b) != (loss, parameters) for a, b in everything)
    for loss, parameters in everything:
        assert any(a <= loss and b <= parameters for a, b in points.values())
    # Optuna's own front is the judge.
    assert {trial.number for trial in found.study.best_trials} == set(points)
    assert len(points) > 1
    assert {"trade_off.png", "trade_off.svg"} <= {path.name for path in written}
    print_results(found)
    assert "Pareto front (" in capsys.readouterr().out


def test_a_search_without_a_success_ends_with_the_first_reason(tmp_path) -> None:
    impossible = {"parameters": ("heads=5|6|7", "lr=1e-4..1e-3"), "arguments": ("--width", "31")}
    found = search(tmp_path / "few", trials=3, **impossible)
    found.run(show_bar=False)
    first = next(t.user_attrs["reason"] for t in found.study.get_trials())
    with pytest.raises(SearchFailed, match=f"3 of 3 trials failed and none came to its end; the first: {first}"):
        write_results(found)
    impossible["parameters"] = ("lr=1e-4..1e-3",)
    impossible["arguments"] = ("--width", "31", "--heads", "4")
    found = search(tmp_path / "many", trials=50, **impossible)
    with pytest.raises(SearchFailed, match="the first 8 trials failed, all for one reason: --width 31 must be"):
        found.run(show_bar=False)


def test_a_full_disk_ends_the_search_and_the_trial_is_continued_while_a_defect_is_not_met_twice(tmp_path) -> None:
    fine = {"parameters": ("lr=1e-4..1e-2:log",), "prune": "none"}
    with pytest.raises(OSError, match="No space"):
        search(tmp_path / "s", fake=FakeRecipe({1: _full_disk}), trials=4, **fine).run(show_bar=False)
    with pytest.raises(KeyError, match="a defect"):
        search(tmp_path / "s", fake=FakeRecipe({2: _defect}), trials=4, **fine).run(show_bar=False)
    found = search(tmp_path / "s", trials=4, **fine)
    found.run(show_bar=False)
    assert [state for state, *_ in tried(found)] == ["completed", "completed", "failed", "completed"]


def _run(folder: Path, fake: FakeRecipe) -> None:
    search(folder, fake=fake).run(show_bar=False)


def test_hyperband_prunes_too(tmp_path) -> None:
    found = search(tmp_path / "s", trials=10, prune="hyperband", parameters=("lr=1e-5..1e-1:log",))
    found.run(show_bar=False)
    assert {state for state, *_ in tried(found)} == {"completed", "pruned"}


def _command(*arguments: Any) -> int:
    return main([str(argument) for argument in arguments])


def test_two_trials_of_a_real_training_choose_width_and_layer_pattern(tmp_path, capsys) -> None:
    write_corpus(tmp_path / "data")
    own = ["--heads", 2, "--kv-heads", 1, "--ff", 24, "--context", 16, "--batch", 4, "--steps", 4, "--eval-steps", 2]
    given = ["search", "train", "--trials", 2, "--out", tmp_path / "s", "--threads", 1, "--prune-after", 1]
    given += ["--parameter", "lr=1e-3..1e-1:log", "--parameter", "width=8|16", "--parameter"]
    given += ["mixers=mamba,attention|mamba2,mamba", "--objective", "bits_per_byte"]
    behind = ["--", "--data", tmp_path / "data", "--cache", tmp_path / "cache", "--layers", 2, *own]
    assert _command(*given, *behind) == 0
    said = capsys.readouterr().out
    assert "search of train: best trials" in said
    best = json.loads((tmp_path / "s" / "best.json").read_text())
    config = json.loads((tmp_path / "s" / "trials" / str(best["trial"]) / "model" / "config.json").read_text())
    assert config["mixers"] == best["parameters"]["mixers"].split(",")
    assert config["hidden_size"] == best["parameters"]["width"]
    assert best["metrics"]["bits_per_byte"] == best["objective"]["value"]
    log = (tmp_path / "s" / "trials" / f"{best['trial']}.log").read_text()
    assert "step" in log
    # The command of the result is one that the command line takes, and gives the same model.
    words = shlex.split(best["command"])[1:]
    assert _command(*words) == 0
    report = json.loads((tmp_path / "s" / "best" / "report.json").read_text())
    assert report["validation"]["bits_per_byte"] == best["objective"]["value"]
    # The same command has nothing left to do.
    capsys.readouterr()
    assert _command(*given, *behind) == 0
    assert "trial 0:" not in capsys.readouterr().out
