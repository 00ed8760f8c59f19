"""The demonstration of docs/conversion.md, from end to end in a few steps."""

import json

import pytest

pytest.importorskip("transformers", reason="transformers is not installed")
pytest.importorskip("matplotlib", reason="matplotlib is not installed")

from neural_layers.distill.recipes.conversion_demo import DemoOptions, main, run
from neural_layers.distill.recipes.conversion_report import table

TEXT = "".join(chr(97 + (i * i // 7 + i % 5) % 26) + " " * (i % 4 == 0) for i in range(600))


def test_the_demonstration_runs_and_writes_what_it_found(tmp_path) -> None:
    for name in ("train", "valid"):
        (tmp_path / f"{name}.txt").write_text(TEXT)
    small = {"width": 16, "heads": 2, "kv_heads": 1, "context": 12, "batch": 2, "eval_windows": 4}
    steps = {"teacher_steps": 3, "calibration_steps": 2, "steps": 2}
    printed = table(run(DemoOptions(data=tmp_path, out=tmp_path / "out", **small, **steps)))
    result = json.loads((tmp_path / "out" / "results.json").read_text())
    assert result["replaced"] == [1, 3]
    assert result["original"] == pytest.approx(result["transformers"], abs=1e-5)
    assert result["fitted"] == result["curves"]["text alone"][0][1] == result["curves"]["distilled"][0][1]
    assert {len(curve) for curve in result["curves"].values()} == {2}
    assert (tmp_path / "out" / "conversion.png").read_bytes().startswith(b"\x89PNG")
    assert "| converted, as `convert_to_hybrid` returns it |" in printed


def test_missing_and_short_data_are_named(tmp_path, capsys) -> None:
    assert main(["--data", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "holds no train.txt" in capsys.readouterr().err
    (tmp_path / "train.txt").write_text("short")
    assert main(["--data", str(tmp_path), "--out", str(tmp_path / "out")]) == 2
    assert "train.txt has 5 characters; 192 are needed" in capsys.readouterr().err
