"""`neural-layers bench` and `python -m benchmarks`: tables, files, exit statuses, and nobody silently left out."""

import json
import subprocess
import sys

import pytest

from neural_layers.benchmarks import case as case_module
from neural_layers.benchmarks import record, run_benchmarks
from neural_layers.benchmarks import run as run_module
from neural_layers.benchmarks.case import Call, Case, Peer
from neural_layers.benchmarks.cases import CASES
from neural_layers.benchmarks.environment import cpu_name, describe_environment, machine_slug
from neural_layers.cli import main


class NoServer:
    """In place of the process that measures memory, which takes seconds to start."""

    def __init__(self, threads: int) -> None:
        self.threads = threads

    def __enter__(self) -> "NoServer":
        return self

    def __exit__(self, *exception: object) -> None: ...

    def peaks(self, case: Case, size: object, name: str, **options: object) -> dict:
        return {"forward": 5.0, "both": 7.0} if case.leaves else {"forward": 5.0}


@pytest.fixture
def no_server(monkeypatch):
    monkeypatch.setattr(run_module, "MemoryServer", NoServer)


def run_one(op: str, **options) -> dict:
    (result,) = run_benchmarks([op], effort="tiny", **options)
    return result


def test_bench_prints_a_table_and_writes_json_and_plots(tmp_path, capsys) -> None:
    assert main(["bench", "swiglu", "--tiny", "--out", str(tmp_path / "new")]) == 0
    printed = capsys.readouterr()
    assert "swiglu: F 16, float32, 1 thread" in printed.out
    assert "torch eager" in printed.out
    assert "Liger: absent: runs on cuda only" in printed.out
    assert printed.out.rstrip().endswith("swiglu.png")
    assert "swiglu, rows 3" in printed.err
    result = json.loads((tmp_path / "new" / "swiglu.json").read_text())
    assert (result["op"], result["effort"]) == ("swiglu", "tiny")
    environment = result["environment"]
    assert {"date", "commit", "cpu", "threads", "load", "versions", "platform", "native"} <= set(environment)
    (case,) = result["cases"]
    assert [row["size"]["rows"] for row in case["rows"]] == [3, 5]
    for row in case["rows"]:
        for name in (row["auto"], "torch eager"):
            entry = row["contenders"][name]
            assert entry["forward"]["lower"] <= entry["forward"]["median"] <= entry["forward"]["upper"]
            assert {"both", "memory", "difference"} <= set(entry)
            assert set(entry["memory"]) & {"both", "unmeasured"}
        assert row["limit"]["forward"]["median"] > 0


def test_all_backends_of_ours_are_timed_or_have_a_reason(no_server) -> None:
    (case,) = run_one("rms_norm")["cases"]
    timed = {name.removeprefix("neural_layers ") for name in case["rows"][0]["contenders"] if "neural" in name}
    from neural_layers.kernels.dispatch import OPS

    assert timed | set(case["backends"]) == {backend.name for backend in OPS["rms_norm"].backends}
    assert not timed & set(case["backends"])
    assert case["backends"]["reference"] == "the definition, which is written to be read"


def test_a_peer_that_is_not_installed_is_named_with_what_to_install(no_server, monkeypatch) -> None:
    monkeypatch.setattr(case_module, "is_installed", lambda module: not module.startswith(("mambapy", "transformers")))
    (case,) = run_one("selective_scan")["cases"]
    assert case["absent"]["mambapy"] == "not installed; pip install 'neural-layers[bench]'"
    assert case["absent"]["transformers"] == "not installed; pip install 'neural-layers[models]'"
    assert case["absent"]["mamba_ssm"] == "runs on cuda only"
    assert all("neural_layers" in name for row in case["rows"] for name in row["contenders"])


def _with_peer(monkeypatch, prepare) -> dict:
    case = CASES["swiglu"]
    fields = {**vars(case), "peers": (Peer("odd one", prepare),)}
    monkeypatch.setattr(run_module, "cases_of", lambda op: (Case(**fields),))
    (result,) = run_one("swiglu")["cases"]
    return result["rows"][0]["contenders"]["odd one"]


def test_a_peer_that_fails_is_shown_with_the_reason_and_the_others_are_timed(no_server, monkeypatch) -> None:
    def fail(inputs):
        raise RuntimeError("no kernel\nfor this")

    entry = _with_peer(monkeypatch, fail)
    assert entry["failed"] == "RuntimeError: no kernel for this"
    assert "forward" not in entry


def test_a_peer_that_computes_something_else_is_not_timed(no_server, monkeypatch) -> None:
    entry = _with_peer(monkeypatch, lambda inputs: Call(lambda: inputs["gate"] + inputs["up"], (inputs["gate"],)))
    assert entry["failed"].startswith("computes something else: differs by")
    assert "forward" not in entry


def test_a_peer_that_cannot_be_run_in_a_child_is_not_run_in_this_process(no_server, monkeypatch) -> None:
    def explode():
        raise AssertionError("run where it would take this process down")

    monkeypatch.setattr(NoServer, "peaks", lambda *args, **options: {"failed": "killed by the system"})
    monkeypatch.setattr(run_module._Runner, "_load", lambda *args: None)
    assert _with_peer(monkeypatch, lambda inputs: Call(explode))["failed"] == "killed by the system"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["softmax"], "there is no benchmark of 'softmax'; there are"),
        (["swiglu", "--device", "tpu"], "invalid choice: 'tpu'"),
        (["swiglu", "--threads", "0"], "--threads 0 must be at least 1"),
        (["swiglu", "--out", "a", "--record"], "--out and --record"),
        (["swiglu", "--out", __file__], "is a file; --out takes a folder"),
    ],
)
def test_bad_arguments_are_answered_in_one_line_with_status_2(arguments, message, capsys) -> None:
    assert main(["bench", *arguments]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_a_missing_gpu_is_told(monkeypatch, capsys) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["bench", "swiglu", "--device", "cuda"]) == 2
    assert "torch sees no CUDA device" in capsys.readouterr().err


def test_recording_outside_a_checkout_names_the_remedy(monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setattr(record, "_CHECKOUT", tmp_path)
    assert main(["bench", "swiglu", "--tiny", "--record"]) == 2
    assert "give --out DIR" in capsys.readouterr().err


def test_recording_writes_below_the_machines_name(no_server, monkeypatch, tmp_path, capsys) -> None:
    monkeypatch.setattr(record, "RESULTS", tmp_path)
    assert main(["bench", "swiglu", "--tiny", "--record", "--threads", "2"]) == 0
    assert (tmp_path / machine_slug("cpu") / "swiglu-2-threads.json").is_file()


def test_python_m_benchmarks_is_the_same_command() -> None:
    done = subprocess.run([sys.executable, "-m", "benchmarks", "softmax"], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr.startswith("neural-layers: there is no benchmark of 'softmax'")


def test_without_rich_the_extra_is_named(monkeypatch, capsys) -> None:
    monkeypatch.setitem(sys.modules, "rich", None)
    assert main(["bench", "swiglu", "--tiny"]) == 2
    assert "rich is missing; pip install 'neural-layers[bench]'" in capsys.readouterr().err


def test_the_environment_names_the_processor_and_fits_a_folders_name() -> None:
    environment = describe_environment("cpu", threads=1)
    assert json.loads(json.dumps(environment)) == environment
    assert environment["cpu"]["name"] == cpu_name() != ""
    assert set(machine_slug("cpu")) <= set("abcdefghijklmnopqrstuvwxyz0123456789-")
