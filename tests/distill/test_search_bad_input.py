"""What a search cannot do is told in one line, before anything is run."""

import json

import pytest

pytest.importorskip("optuna", reason="optuna is not installed")

from hypothesis import given, settings
from hypothesis import strategies as st

from neural_layers.cli import main
from neural_layers.cli.search_recipes import recipe_named
from neural_layers.distill.search.space import parse_parameter
from neural_layers.errors import InputError
from tests.distill.search_runs import OPTIONS, search


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lr", "names no values; write NAME=LOW..HIGH"),
        ("lr=", "names no values"),
        ("layer=1..4", "no option 'layer' to search; did you mean layers"),
        ("colour=1|2", "no option 'colour' to search; there are lr, layers, width"),
        ("lr=1e-2..1e-4", "is an empty range: 0.01 is not below 0.0001"),
        ("layers=3..3", "is an empty range: 3 is not below 3"),
        ("lr=0..1:log", "begins above 0, and this one at 0"),
        ("lr=0.1..1:log:step=0.1", ":log or :step, not both"),
        ("layers=1..4:step=5", "at most 3"),
        ("layers=1..4:step=0", "above 0"),
        ("layers=1..4:linear", "'linear' is not understood"),
        ("layers=1.5..4", "--layers takes whole numbers, and '1.5' is none"),
        ("layers=1|two", "takes whole numbers, and 'two' is none"),
        ("lr=1..inf", "'inf' is no finite number"),
        ("lr=1..", "'' is no finite number"),
        ("lr=a..b", "'a' is no finite number"),
        ("width=32||64", "has an empty choice"),
        ("width=32|32", "names a choice twice"),
        ("lr=0.1|1e-1", "names a choice twice"),
        ("width=32", "has one choice, which is no search; give --width behind --"),
        ("bf16=yes|no", "--bf16 takes no value; write bf16=true|false"),
        ("bf16=0..1", "--bf16 takes no value; write bf16=true|false"),
    ],
)
def test_a_parameter_that_is_none_is_refused(text, said) -> None:
    with pytest.raises(InputError) as refused:
        parse_parameter(text, OPTIONS)
    assert str(refused.value).startswith(f"--parameter {text}")
    assert said in str(refused.value)


@settings(max_examples=50, derandomize=True, deadline=None, database=None)
@given(st.floats(1e-12, 1e12), st.floats(1e-12, 1e12))
def test_a_float_reaches_the_recipe_as_the_same_number(one, other) -> None:
    low, high = sorted((one, other))
    if low == high:
        return
    parameter = parse_parameter(f"lr={low!r}..{high!r}", OPTIONS)
    assert (parameter.low, parameter.high) == (low, high)
    (argument,) = parameter.arguments(high)
    assert float(argument.removeprefix("--lr=")) == high


def test_parameters_have_the_names_of_fields_or_flags() -> None:
    for text in ("steps=1..4", "num-iterations=1..4", "--num_iterations=1..4", "--steps=1..4"):
        assert parse_parameter(text, OPTIONS).name == "steps"
    assert parse_parameter("layers=2..8:step=2", OPTIONS).step == 2
    assert parse_parameter("mixers=a,b|c", OPTIONS).choices == ("a,b", "c")
    switch = parse_parameter("bf16=true|false", OPTIONS)
    assert switch.arguments("true") == ["--bf16"]
    assert switch.arguments("false") == []


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"trials": 0}, "--trials 0 must be at least 1"),
        ({"parameters": ()}, "give --parameter NAME=SPEC"),
        ({"parameters": ("lr=1..2", "lr=2..3")}, "--parameter lr is given twice"),
        ({"objectives": ("los",)}, "fake measures no 'los'; did you mean loss"),
        ({"objectives": ("loss:down",)}, "the direction is min or max, not 'down'"),
        ({"objectives": ("loss", "loss:max")}, "--objective loss is given twice"),
        ({"prune": "sometimes"}, "--prune sometimes must be one of median, hyperband, none"),
        ({"seed": -1}, "--seed -1 is out of range"),
        ({"arguments": ("--lr", "0.1")}, "--lr is searched and given behind --"),
        ({"arguments": ("--steps=3",), "parameters": ("num-iterations=1..4",)}, "--steps is searched and given"),
        ({"arguments": ("--colour", "red")}, "unrecognized arguments: --colour"),
    ],
)
def test_a_search_that_cannot_be_is_refused_before_it_writes(tmp_path, changes, said) -> None:
    with pytest.raises(InputError, match=said):
        search(tmp_path / "s", **changes)
    assert not (tmp_path / "s").exists()


def test_another_search_in_the_folder_is_refused_by_name(tmp_path) -> None:
    one = {"parameters": ("lr=1e-4..1e-2:log", "layers=1..4")}
    search(tmp_path / "s", **one)
    search(tmp_path / "s", trials=50, **one)  # more trials are no other search
    for changes, said in (
        ({"parameters": ("lr=1e-4..1e-1:log", "layers=1..4")}, "lr was 1e-4..1e-2:log .* and is 1e-4..1e-1:log now"),
        ({"parameters": ("lr=1e-4..1e-2:log",)}, "layers was 1..4 .* and is not searched now"),
        ({"parameters": (*one["parameters"], "heads=1|2")}, "heads was not searched .* and is 1|2 now"),
        ({**one, "objectives": ("parameters",)}, "the objectives of the search in .* were loss:min and are param"),
        ({**one, "arguments": ("--width", "8")}, "the arguments of the search in .* and are --width 8 now"),
        ({**one, "seed": 1}, "the seed of"),
    ):
        with pytest.raises(InputError, match=said):
            search(tmp_path / "s", **changes)


def test_a_folder_that_holds_something_else_is_left_alone(tmp_path) -> None:
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(InputError, match=r"is not empty \(notes.txt\) and holds no search"):
        search(tmp_path)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["notes.txt"]
    with pytest.raises(InputError, match="is a file; --out takes a folder"):
        search(tmp_path / "notes.txt")
    (tmp_path / "s").mkdir()
    (tmp_path / "s" / "search.json").write_text("[")
    with pytest.raises(InputError, match="is no search's record"):
        search(tmp_path / "s")


def _refused(capsys, *arguments) -> str:
    assert main(["search", *map(str, arguments)]) == 2
    said = str(capsys.readouterr().err)
    assert said.count("\n") == 1
    return said.removeprefix("neural-layers: ")


def test_the_command_refuses_in_one_line(tmp_path, capsys) -> None:
    common = ("--trials", 2, "--out", tmp_path / "s", "--parameter", "lr=1e-4..1e-2")
    data = ("--data", tmp_path)
    assert _refused(capsys, "bench", *common).startswith(
        "there is no recipe 'bench' to search; there are train, distill ntmm, distill cvm"
    )
    assert "the following arguments are required: --data" in _refused(capsys, "train", *common)
    assert "--find-lr trains nothing" in _refused(capsys, "distill", "ntmm", *common, "--", *data, "--find-lr")
    assert "give it before --" in _refused(capsys, "train", *common, "--", *data, "--threads", 2)
    assert "--workers 0" in _refused(capsys, "train", *common, "--workers", 0, "--", *data)
    said = _refused(capsys, "train", *common, "--parameter", "head=1..4", "--", *data)
    assert "no option 'head' to search; did you mean heads" in said
    said = _refused(capsys, "train", *common, "--objective", "accuracy", "--", *data)
    assert "train measures no 'accuracy'" in said
    assert not (tmp_path / "s").exists()


def test_a_failure_of_all_trials_has_status_1(tmp_path, capsys) -> None:
    common = ["search", "train", "--trials", "2", "--out", str(tmp_path / "s"), "--parameter", "heads=3|5"]
    (tmp_path / "valid.txt").write_text("text of a file")
    assert main([*common, "--", "--data", str(tmp_path / "absent.txt"), "--width", "16"]) == 1
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("neural-layers: 2 of 2 trials failed and none came to its end; the first: ")
    assert "absent.txt" in said
    record = json.loads((tmp_path / "s" / "search.json").read_text())
    assert record["parameters"] == {"heads": "3|5"}


def test_the_sizes_of_a_translator_take_the_place_of_the_preset_s_where_they_fit_each_other(tmp_path) -> None:
    from neural_layers.distill.recipes.cvm_options import CVMOptions

    chosen = CVMOptions(tmp_path, student_layers=3, student_width=24, student_heads=2).chosen().student
    assert (chosen["num_hidden_layers"], chosen["hidden_size"], chosen["num_attention_heads"]) == (3, 24, 2)
    assert chosen["intermediate_size"] == CVMOptions(tmp_path).chosen().student["intermediate_size"]
    for sizes in ({"student_heads": 3}, {"student_width": 20}):
        with pytest.raises(InputError, match="the student cannot be built: "):
            CVMOptions(tmp_path, **sizes).chosen()
    with pytest.raises(InputError, match="--student-layers 0 must be at least 1"):
        CVMOptions(tmp_path, student_layers=0).check()


def test_architecture_fields_of_every_recipe_can_be_searched() -> None:
    assert {"layers", "width", "heads", "kv_heads", "ff", "mixers", "lr"} <= set(recipe_named(("train",)).options)
    ntmm = recipe_named(("distill", "ntmm")).options
    assert {"student_width", "student_heads", "student_mixers", "student_layers", "temperature", "pooling"} <= set(ntmm)
    assert ntmm["augment"].kind == "switch"
    lm = set(recipe_named(("distill", "lm")).options)
    assert {"layers", "width", "heads", "mixers", "temperature"} <= lm
    cvm = set(recipe_named(("distill", "cvm")).options)
    assert {"lr", "temperature", "alpha", "steps", "student_layers", "student_width", "student_heads"} <= cvm
    assert not {"out", "seed", "find_lr", "data"} & set(ntmm)
