"""compare_sizes: bytes, errors and quality against what is counted here, and models that take turns."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_model
from torch import nn

import neural_layers.wrappers.quantization.sizes as sizes
from neural_layers.errors import InputError
from neural_layers.wrappers.modules import tensor_bytes
from neural_layers.wrappers.quantization import Plan, compare_sizes, quantize

SCHEMES = ("bfloat16", "int8_dynamic", "int8_static", "int4", "nf4")


class Tagger(nn.Module):
    """Ids (B, T) → logits (B, T, V), the head tied to the table."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.inner = nn.Embedding(50, 64), nn.Linear(64, 64)
        self.head = nn.Linear(64, 50, bias=False)
        self.head.weight = self.table.weight

    def forward(self, ids, scale=1.0):
        return self.head(torch.tanh(self.inner(self.table(ids)))) * scale


def make_model() -> Tagger:
    torch.manual_seed(0)
    return Tagger()


def make_inputs(count: int = 3) -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randint(50, (2, 5 + i)) for i in range(count)]


def test_a_row_has_the_bytes_and_the_error_of_the_quantized_model() -> None:
    model, inputs = make_model(), make_inputs()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    table = compare_sizes(model, SCHEMES, inputs=inputs, calibration=inputs, rounds=1)
    assert [row.name for row in table.rows] == ["float32", *SCHEMES]
    with torch.no_grad():
        expected = torch.cat([model(batch).flatten() for batch in inputs]).double()
    for scheme in SCHEMES:
        made = make_model()
        report = quantize(made, scheme, calibration=inputs if scheme == "int8_static" else None)
        with torch.no_grad():
            found = torch.cat([made(batch).flatten() for batch in inputs]).double()
        row = table[scheme]
        assert row.bytes == tensor_bytes(made) == report.bytes_after
        assert row.ratio == pytest.approx(report.ratio, abs=1e-4)
        assert row.error == pytest.approx(float((found - expected).norm() / expected.norm()), rel=1e-9)
        assert set(row.latency_ms) == {"p50", "p95", "p99"}
        assert row.throughput > 0
    assert table["float32"].error == 0
    assert table["float32"].ratio == 1
    assert table["nf4"].error > table["int8_dynamic"].error > 0
    assert model.training, "the mode is given back"
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_what_modules_share_is_written_once(tmp_path) -> None:
    model = make_model()
    save_model(model, str(tmp_path / "model.safetensors"), metadata={"format": "pt"})
    found = sizes.file_bytes(model)
    assert abs(found - (tmp_path / "model.safetensors").stat().st_size) < 64, (
        "but for the names in the head of the file"
    )
    assert sum(tensor.nbytes for tensor in load_file(tmp_path / "model.safetensors").values()) < found
    plain = found
    quantize(model, "int8_dynamic")
    assert sizes.file_bytes(model) < plain / 3


def test_rows_take_settings_plans_and_models() -> None:
    model, inputs = make_model(), make_inputs(1)
    ready = make_model()
    quantize(ready, "int4", exclude="inner")
    plan = Plan({"inner": {"scheme": "int8_static"}})
    rows = {
        "double": {"scheme": "nf4", "double_quant": True},
        "inner": plan,
        "ready": ready,
        "no table": {"scheme": "fp4", "embeddings": False},
    }
    table = compare_sizes(model, rows, inputs=inputs, calibration=inputs, rounds=1)
    assert [row.name for row in table.rows] == ["float32", *rows]
    assert table["ready"].bytes == tensor_bytes(ready)
    assert table["inner"].bytes < table["float32"].bytes


def test_quality_is_what_the_metric_says_of_each_model() -> None:
    seen = []

    def metric(model):
        assert not torch.is_grad_enabled()
        assert not model.training
        seen.append(type(model.inner).__name__)
        return {"accuracy": len(seen) / 4, "loss": 2.0}

    table = compare_sizes(make_model(), ["nf4"], inputs=make_inputs(1), metric=metric, rounds=1)
    assert seen == ["Linear", "Linear4bit"]
    assert table["nf4"].quality == {"accuracy": 0.5, "loss": 2.0}
    assert json.loads(json.dumps(table.to_dict()))["rows"][1]["quality"]["accuracy"] == 0.5
    printed = str(table).splitlines()
    assert "accuracy" in printed[0]
    assert printed[2].startswith("nf4")
    one = compare_sizes(make_model(), ["nf4"], inputs=make_inputs(1), metric=lambda model: 0.25, rounds=1)
    assert one["nf4"].quality == {"quality": 0.25}


def test_every_scheme_has_its_turn_in_each_round(monkeypatch) -> None:
    calls = []
    monkeypatch.setattr(sizes, "_caller", lambda model: lambda batch: calls.append((id(model), batch.shape[1])))
    compare_sizes(make_model(), ["nf4", "int4"], inputs=make_inputs(2), rounds=5)
    assert len(calls) == 3 * (1 + 5)
    for i in range(0, len(calls), 3):
        turn = calls[i : i + 3]
        assert len({model for model, _ in turn}) == 3
        assert len({length for _, length in turn}) == 1


def test_batches_are_dicts_tuples_or_tensors() -> None:
    (ids,) = make_inputs(1)
    table = compare_sizes(make_model(), ["int4"], inputs=[{"ids": ids}, (ids, 2.0), ids], rounds=1)
    assert 0 < table["int4"].error < 1


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"inputs": []}, InputError, "inputs has no batch"),
        (
            {"inputs": torch.zeros(1, 2, dtype=torch.int64)},
            InputError,
            r"give an iterable of batches, such as \[inputs\]",
        ),
        ({"schemes": ["int3"]}, ValueError, "scheme='int3' must be one of"),
        ({"schemes": ["nf4", "nf4"]}, ValueError, "the scheme 'nf4' is there twice"),
        ({"schemes": {"float32": "nf4"}}, ValueError, "the row 'float32' is there twice"),
        ({"schemes": [Plan({})]}, ValueError, r"schemes\[0\] is a Plan; give names, or a dict"),
        ({"schemes": {"a": {"block_size": 64}}}, ValueError, "the row 'a' has no 'scheme'"),
        ({"schemes": ["int8_static"]}, ValueError, "int8_static needs calibration"),
        ({"rounds": 0}, ValueError, "rounds=0 must be at least 1"),
        ({"metric": lambda model: math.nan}, ValueError, "the metric gives quality=nan for float32"),
    ],
)
def test_bad_input_is_named(changes, error, message) -> None:
    arguments = {"schemes": ["nf4"], "inputs": make_inputs(1), "rounds": 1} | changes
    with pytest.raises(error, match=message):
        compare_sizes(make_model(), arguments.pop("schemes"), **arguments)


def test_an_output_that_is_not_finite_is_refused() -> None:
    model = make_model()
    nn.init.constant_(model.inner.bias, math.nan)
    with pytest.raises(InputError, match="holds NaN or infinity"):
        compare_sizes(model, ["nf4"], inputs=make_inputs(1), rounds=1)
