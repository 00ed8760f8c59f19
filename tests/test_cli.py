"""The command line's exit statuses, without running anything long."""

import subprocess
import sys

import pytest

from neural_layers.cli import main
from neural_layers.errors import InputError


@pytest.mark.parametrize(
    ("raised", "status", "printed"),
    [
        (InputError("no such\nfile"), 2, "neural-layers: no such file\n"),
        (
            ImportError("sacrebleu is missing; pip install 'neural-layers[train]'"),
            2,
            "neural-layers: sacrebleu is missing",
        ),
        (FloatingPointError("the loss is nan at step 3"), 1, "neural-layers: the loss is nan at step 3\n"),
        (OSError(28, "No space left on device"), 1, "neural-layers: [Errno 28] No space left on device\n"),
        (KeyboardInterrupt(), 130, "neural-layers: interrupted"),
    ],
)
def test_failures_are_told_in_one_line(raised, status, printed, monkeypatch, capsys) -> None:
    def fail(options):
        raise raised

    monkeypatch.setattr("neural_layers.cli.distill_cvm.run_cvm", fail)
    assert main(["distill", "cvm", "--out", "x"]) == status
    error = capsys.readouterr().err
    assert error.startswith(printed)
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "the following arguments are required: COMMAND"),
        (["distil"], "invalid choice: 'distil'"),
        (["distill", "cvm"], "the following arguments are required: --out"),
    ],
)
def test_wrong_arguments_are_answered_in_one_line(arguments, message, capsys) -> None:
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_python_m_runs_the_same_command_line() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "neural_layers", "distill", "--help"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0
    assert "an encoder-decoder translator" in done.stdout
