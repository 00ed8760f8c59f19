"""INT8 by ONNX Runtime's quantizers: against models that round alike, calibrated on data of ours."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper

from neural_layers.errors import InputError
from neural_layers.kernels.int8 import quantize_rows
from neural_layers.models.export import OnnxModel, OnnxTranslator, VerificationError, export_onnx
from neural_layers.models.export import integer as integer_graphs
from neural_layers.models.export.reference import Tolerance
from tests.models.test_export_quantized import MIXERS, hybrid, translator

SIZES = {"hidden_size": 80, "num_attention_heads": 5, "intermediate_size": 96, "vocab_size": 500}
IDS = torch.randint(500, (4, 50), generator=torch.Generator().manual_seed(2))
SOURCE = {"hidden_size": 64, "vocab_size": 500}


def calibrated(scheme: str, *batches: Any) -> dict[str, Any]:
    return {"quantize": scheme, **({"calibration": batches} if scheme == "int8_static" else {})}


def relative(found: np.ndarray, wanted: torch.Tensor) -> float:
    difference = torch.from_numpy(found) - wanted
    return float(difference.square().mean().sqrt() / wanted.square().mean().sqrt())


@pytest.mark.parametrize(("scheme", "tied"), [("int8_dynamic", True), ("int8_static", True), ("int8_static", False)])
@torch.no_grad()
def test_a_hybrid_is_near_the_float_model_and_its_own_rounding(scheme: str, tied: bool, tmp_path: Path) -> None:
    model = hybrid(**SIZES, mixers=MIXERS if tied else ["mamba2"], tie_word_embeddings=tied)
    model.model.embed_tokens.weight[0] = 0.0  # as of padding: a row that has any scale
    checks = export_onnx(model, tmp_path, **calibrated(scheme, IDS, {"input_ids": IDS[:, :7]}))
    assert max(check.error for check in checks) < 0.05
    assert relative(OnnxModel(tmp_path, threads=1).forward(IDS)[0], model(IDS).logits) < 0.08  # measured: 0.05
    stored = {weight.name: weight for weight in onnx.load(tmp_path / "model.onnx").graph.initializer}
    assert sum(len(weight.raw_data) for weight in stored.values()) < 0.45 * 4 * sum(
        p.numel() for p in model.parameters()
    )
    wide = [name for name, weight in stored.items() if 500 in weight.dims and len(weight.raw_data) >= 40_000]
    assert len(wide) == 1 if tied else 2


@pytest.mark.parametrize("scheme", ["int8_dynamic", "int8_static"])
@torch.no_grad()
def test_a_translator_is_near_the_float_model_and_its_own_rounding(scheme: str, tmp_path: Path) -> None:
    model = translator(**SOURCE)
    batch = {"input_ids": IDS, "attention_mask": (IDS > 20).long(), "labels": IDS[:, :20]}
    checks = export_onnx(model, tmp_path, **calibrated(scheme, batch))
    assert max(check.error for check in checks) < 0.05
    served = OnnxTranslator(tmp_path, threads=1)
    context = served.encoder.run(IDS.numpy(), np.ones_like(IDS.numpy()))
    found, _ = served.decoder.run(IDS.numpy(), np.ones_like(IDS.numpy()), served.decoder.start(4), 50, **context)
    assert relative(found, model(input_ids=IDS, decoder_input_ids=IDS).logits) < 0.05


def test_ranges_are_those_of_the_calibration_data_and_weights_those_of_quantize(tmp_path: Path) -> None:
    model = hybrid(**SIZES, mixers=["attention"])
    seen = []
    model.model.layers[0].mixer.inner.o_proj.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0]))
    export_onnx(model, tmp_path, quantize="int8_static", calibration=[IDS[:2], IDS[2:]], verify=False)
    assert not seen
    with torch.no_grad():
        model(IDS)
    proto = onnx.load(tmp_path / "model.onnx")
    stored = {weight.name: numpy_helper.to_array(weight) for weight in proto.graph.initializer}
    found = dict(integer_graphs._input_ranges(proto))["model.layers.0.mixer.inner.o_proj"]
    low, high = seen[0].amin().item(), seen[0].amax().item()
    # Embeddings are in 8 bits as the graph reads them, which changes what follows.
    assert found[0] == pytest.approx((high - low) / 255, rel=0.01)
    assert abs(found[1] + low / found[0]) < 2
    codes, scale = quantize_rows(model.model.layers[0].mixer.inner.o_proj.weight)
    name = "model.layers.0.mixer.inner.o_proj.weight"
    # Where a weight lies between two codes, ONNX Runtime divides and we multiply.
    np.testing.assert_allclose(stored[name + "_quantized"], codes.numpy().T, atol=1)
    assert np.mean(stored[name + "_quantized"] != codes.numpy().T) < 0.001
    np.testing.assert_allclose(stored[name + "_scale"], scale.numpy(), rtol=1e-6)


def test_rounding_for_readers_that_do_not_ask_for_it_is_found(tmp_path: Path, monkeypatch: Any) -> None:
    """The inputs of x_proj go past it as well; ONNX Runtime would round them for all."""
    monkeypatch.setattr(integer_graphs, "Counter", lambda names: dict.fromkeys(names, 1))
    monkeypatch.setattr("neural_layers.models.export.export.ALIKE", Tolerance(0.02, is_mean=True))
    with pytest.raises(VerificationError, match="the mamba of layer 0 differs"):
        export_onnx(hybrid(**SIZES, mixers=["mamba"]), tmp_path / "out", quantize="int8_static", calibration=[IDS])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"quantize": "int8_static"}, "quantize='int8_static' needs calibration, batches of token ids"),
        ({"quantize": "int8_dynamic", "calibration": [IDS]}, "quantize='int8_dynamic' takes no calibration; leave it"),
        ({"quantize": "int8_static", "calibration": []}, "calibration is empty; give batches of token ids"),
        ({"quantize": "int8_static", "calibration": IDS}, "calibration is a Tensor; give an iterable of batches"),
        ({"quantize": "int8_static", "calibration": [IDS[0]]}, r"batch 0 is torch.int64 of shape \(50,\); expected"),
        ({"quantize": "int8_static", "calibration": [IDS.float()]}, "batch 0 is torch.float32 of shape"),
        ({"quantize": "int8_static", "calibration": [IDS, IDS + 400]}, "batch 1 has token id [5-9].., outside"),
        ({"quantize": "int8_static", "calibration": [{"ids": IDS}]}, "calibration batch 0 does not fit HybridForC"),
        ({"quantize": "int8_static", "calibration": [IDS.repeat(1, 9)]}, "has 450 tokens, more than the context"),
        ({"quantize": "int8_static", "calibration": [(IDS, IDS[:1])]}, r"attention_mask of .* has shape \(1, 50\)"),
    ],
)  # fmt: skip
def test_calibration_that_does_not_fit_is_named(arguments: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        export_onnx(hybrid(**SIZES, mixers=["attention"]), tmp_path, **arguments)
    assert not list(tmp_path.iterdir())


def test_calibration_of_a_translator_needs_targets(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="batch 0 has neither labels nor decoder_input_ids; give the targets too"):
        export_onnx(translator(**SOURCE), tmp_path, quantize="int8_static", calibration=[{"input_ids": IDS}])
    batch = {"input_ids": IDS, "decoder_input_ids": IDS[:1]}
    with pytest.raises(InputError, match="batch 0 has 4 sources and 1 targets"):
        export_onnx(translator(**SOURCE), tmp_path, quantize="int8_static", calibration=[batch])
