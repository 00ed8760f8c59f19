"""Files that appear whole or not at all."""

import json

import pytest

from neural_layers.distill.data.pairs import DataError
from neural_layers.distill.files import save_json
from neural_layers.distill.run_folder import RunFolder
from neural_layers.errors import InputError


def test_an_interrupted_write_leaves_the_old_file(tmp_path, monkeypatch) -> None:
    path = tmp_path / "report.json"
    save_json(path, {"kept": 1})

    def full(*args) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", full)
    with pytest.raises(OSError, match="No space left"):
        save_json(path, {"kept": 2})
    assert json.loads(path.read_text()) == {"kept": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_json_holds_no_nan(tmp_path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        save_json(tmp_path / "x.json", {"loss": float("nan")})
    assert not list(tmp_path.iterdir())


def test_an_empty_folder_is_taken_and_another_is_refused(tmp_path) -> None:
    RunFolder(tmp_path / "new")
    run = RunFolder(tmp_path / "new")
    run.append_log({"step": 1})
    run.append_log({"step": 2})
    assert [json.loads(line)["step"] for line in (run.path / "train_log.jsonl").read_text().splitlines()] == [1, 2]
    with pytest.raises(InputError, match="is not empty and nothing in it is overwritten"):
        RunFolder(tmp_path / "new")
    with pytest.raises(InputError, match="is a file; --out takes a folder"):
        RunFolder(run.path / "train_log.jsonl")


def test_a_model_is_saved_whole_or_not_at_all(tmp_path) -> None:
    class Breaking:
        def save_pretrained(self, folder) -> None:
            folder.mkdir(parents=True)
            (folder / "config.json").write_text("{}")
            raise OSError(28, "No space left on device")

    run = RunFolder(tmp_path)
    with pytest.raises(OSError, match="No space left"):
        run.save_model("student", Breaking(), None)
    assert not list(tmp_path.iterdir())


def test_data_errors_are_input_errors() -> None:
    assert issubclass(DataError, InputError)
