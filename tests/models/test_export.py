"""Exported graphs: equal to PyTorch at all lengths, standard operators, written whole or not at all."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from neural_layers import Mamba2, RotaryEmbedding
from neural_layers.errors import InputError
from neural_layers.models.export import OnnxModel, VerificationError, export_onnx
from neural_layers.models.export import attention as attention_graph
from neural_layers.models.export import recurrent as recurrent_graph
from neural_layers.models.export.verify import lengths
from neural_layers.models.hybrid import HybridCache, HybridConfig, HybridForCausalLM, HybridForSequenceClassification

# Measured: 2e-6 of the largest logit.
CLOSE = 2e-5
MIXERS = ["mamba", "mamba2", "attention", "sliding_attention"]
SMALL = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "mamba2_head_dim": 16}
VARIANTS: dict[str, dict[str, Any]] = {
    "all mixers, rope": {"mixers": MIXERS, "sliding_window": 7, "mamba2_n_groups": 2, "num_key_value_heads": 2},
    "alibi, no feed-forward, untied": {
        "mixers": MIXERS, "sliding_window": 1, "position_embedding": "alibi", "intermediate_size": 0,
        "tie_word_embeddings": False,
    },
    "no positions, biases, norms": {
        "mixers": MIXERS, "position_embedding": None, "qk_norm": True, "attention_bias": True,
        "attention_output_bias": True, "mamba_d_conv": 3, "mamba2_d_conv": 2,
    },
    "mamba alone": {"mixers": ["mamba", "mamba"], "intermediate_size": 0, "mamba_dt_rank": 3},
}  # fmt: skip
_ORIGINAL = {"factor": 4.0, "original_max_position_embeddings": 48}
SCALINGS: dict[str, dict[str, Any]] = {
    "linear": {"factor": 2.0},
    "dynamic": _ORIGINAL,
    "yarn": _ORIGINAL,
    "llama3": {**_ORIGINAL, "low_freq_factor": 1.0, "high_freq_factor": 4.0},
}


def build(seed: int = 0, **overrides: Any) -> HybridForCausalLM:
    """A small model whose weights are all in play: norms are not 1, biases are not 0."""
    mixers = overrides.pop("mixers", MIXERS)
    config = HybridConfig(
        **{**SMALL, "mixers": mixers, "num_hidden_layers": len(mixers), "max_position_embeddings": 512, **overrides}
    )
    torch.manual_seed(seed)
    model = HybridForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> tuple[HybridForCausalLM, Path]:
    """All mixers in float32."""
    folder = tmp_path_factory.mktemp("exported")
    model = build(sliding_window=7, num_key_value_heads=2)
    export_onnx(model, folder)
    return model, folder


def relative(found: Any, wanted: Any) -> float:
    found, wanted = np.asarray(found), np.asarray(wanted)
    assert found.shape == wanted.shape
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


@pytest.mark.parametrize("variant", VARIANTS)
def test_graph_equals_the_model_at_all_lengths_with_state_and_padding(variant: str, tmp_path: Path) -> None:
    checks = export_onnx(build(**VARIANTS[variant]), tmp_path)
    assert {1, 2, 63, 64, 65, 128} <= {check.length for check in checks}
    assert {(check.batch, check.past > 0) for check in checks} == {(1, False), (1, True), (3, False), (3, True)}
    assert max(check.error for check in checks) < CLOSE


@pytest.mark.parametrize("kind", SCALINGS)
def test_rope_scalings_are_those_of_the_model(kind: str, tmp_path: Path) -> None:
    rope = {"rope_theta": 5000.0, "rope_type": kind, **SCALINGS[kind]}
    model = build(mixers=["attention", "mamba"], rope_parameters=rope)
    assert max(check.error for check in export_onnx(model, tmp_path)) < CLOSE


def test_options_of_converted_mamba2_checkpoints_are_exported(tmp_path: Path) -> None:
    model = build(mixers=["mamba2", "mamba2"], mamba2_d_state=16)
    for layer in model.model.layers:
        layer.mixer.inner = Mamba2(
            64, state_dim=16, head_dim=16, num_groups=2, bias=True, activation=None, norm=False, bc_norm=True,
            conv_bias=False, rotary=RotaryEmbedding(16), step_limit=(0.001, 0.1),
        )  # fmt: skip
    assert max(check.error for check in export_onnx(model, tmp_path)) < CLOSE


def test_one_call_equals_any_split_and_the_state_of_a_call_is_not_changed(exported: Any) -> None:
    model, folder = exported
    served = OnnxModel(folder, threads=1)
    ids = torch.randint(96, (2, 150))
    with torch.no_grad():
        wanted = model(ids).logits
    whole, _ = served.forward(ids)
    assert relative(whole, wanted) < CLOSE
    first, state = served.forward(ids[:, :70])
    for _ in range(2):  # from the same state twice
        pieces, now = [first], state
        for begin, end in ((70, 71), (71, 135), (135, 150)):
            logits, now = served.forward(ids[:, begin:end], state=now)
            pieces.append(logits)
        assert relative(np.concatenate(pieces, axis=1), wanted) < CLOSE
    last, _ = served.forward(ids, keep=3)
    assert relative(last, wanted[:, -3:]) < CLOSE


def test_lengths_beyond_the_verified_ones_are_right(exported: Any) -> None:
    model, folder = exported
    served, ids = OnnxModel(folder, threads=1), torch.randint(96, (1, 500))
    with torch.no_grad():
        assert relative(served.forward(ids)[0], model(ids).logits) < CLOSE


def test_half_precision_models_are_computed_in_float32(tmp_path: Path) -> None:
    model = build(mixers=["mamba", "attention"]).bfloat16()
    export_onnx(model, tmp_path)
    ids = torch.randint(96, (1, 9))
    with torch.no_grad():
        wanted = model.float()(ids).logits
    assert relative(OnnxModel(tmp_path, threads=1).forward(ids)[0], wanted) < CLOSE


def test_float_graph_has_standard_operators_alone_and_a_tied_embedding_once(exported: Any) -> None:
    model, folder = exported
    proto = onnx.load(folder / "model.onnx")
    onnx.checker.check_model(proto)
    assert [(opset.domain, opset.version) for opset in proto.opset_import] == [("", 23)]
    assert {node.domain for node in proto.graph.node} == {""}
    assert [node.op_type for node in proto.graph.node].count("Scan") == 2
    stored = sum(int(np.prod(weight.dims)) for weight in proto.graph.initializer)
    assert stored < sum(p.numel() for p in model.parameters()) + 500


@pytest.mark.parametrize(("quantize", "share", "largest"), [("int8", 0.45, 0.09), ("int4", 0.3, 0.8)])
def test_quantized_graphs_are_small_and_close(quantize: str, share: float, largest: float, tmp_path: Path) -> None:
    """Against the model that is not rounded. Normal weights are the worst case: 4 bits change each by 10 %, which three
    layers make 55 % of the logits' root mean square; 8 bits change it by 5.5 %. The export itself compares with a model
    rounded alike."""
    # One key head: its projections are small, and are rounded like those that they are fused with.
    sizes = {"hidden_size": 256, "intermediate_size": 512, "vocab_size": 1024, "num_key_value_heads": 1}
    model = build(mixers=["mamba", "mamba2", "attention"], **sizes)
    export_onnx(model, tmp_path / "float32", verify=False)
    checks = export_onnx(model, tmp_path / quantize, quantize=quantize)
    assert max(check.error for check in checks) < 0.1
    sizes = [(tmp_path / name / "model.onnx").stat().st_size for name in (quantize, "float32")]
    assert sizes[0] < share * sizes[1]
    ids = torch.randint(1024, (2, 70))
    with torch.no_grad():
        wanted = model(ids).logits.numpy()
    difference = OnnxModel(tmp_path / quantize, threads=1).forward(ids)[0] - wanted
    assert np.sqrt(np.square(difference).mean() / np.square(wanted).mean()) < largest


def test_weights_of_their_own_file_serve_and_old_ones_are_removed(
    exported: Any, tmp_path: Path, monkeypatch: Any
) -> None:
    model, folder = exported
    for _ in range(2):
        export_onnx(model, tmp_path, external_data=True, verify=False)
    (data,) = tmp_path.glob("*.data")
    assert data.stat().st_size > 10 * (tmp_path / "model.onnx").stat().st_size / 2
    ids = torch.randint(96, (1, 5))
    np.testing.assert_array_equal(OnnxModel(tmp_path).forward(ids)[0], OnnxModel(folder).forward(ids)[0])
    export_onnx(model, tmp_path, verify=False)
    assert not list(tmp_path.glob("*.data"))
    monkeypatch.setattr("neural_layers.models.export.folder.LARGEST", 1000)  # as of a model over 2 GB
    assert export_onnx(model, tmp_path)
    assert len(list(tmp_path.glob("*.data"))) == 1


def test_a_wrong_graph_leaves_no_file_and_the_error_says_where(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(recurrent_graph, "silu", lambda g, x: g.op("Mul", x, g.op("HardSigmoid", x)))
    message = (
        r"^the mamba of layer 0 differs from PyTorch by 0\.\d+ of its size \(allowed: 0.0001\) at length 1, 0 tokens"
    )
    with pytest.raises(VerificationError, match=message):
        export_onnx(build(), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_fault_that_only_long_inputs_show_is_found(tmp_path: Path, monkeypatch: Any) -> None:
    # As a traced graph has it: a length is built in.
    monkeypatch.setattr(recurrent_graph, "CHUNK", 32)
    chunks = recurrent_graph._Chunks.__init__

    def frozen(self: Any, *args: Any) -> None:
        chunks(self, *args)
        self.fill = self.g.op("Min", self.fill, [0])  # no filling: right where whole chunks are read

    monkeypatch.setattr(recurrent_graph._Chunks, "__init__", frozen)
    with pytest.raises(Exception, match=r"length 63|Reshape"):
        export_onnx(build(mixers=["mamba2"]), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_window_that_is_off_by_one_is_found(tmp_path: Path, monkeypatch: Any) -> None:
    right = attention_graph.Shared.causal_bias

    def wrong(self: Any, window: int | None, heads: int | None) -> str:
        return right(self, None if window is None else window + 1, heads)

    monkeypatch.setattr(attention_graph.Shared, "causal_bias", wrong)
    with pytest.raises(VerificationError, match=r"length 203, 0 tokens before it, batch 1"):
        export_onnx(build(mixers=["sliding_attention"] * 2, sliding_window=200), tmp_path)


def test_an_interrupted_export_leaves_the_old_one(exported: Any, tmp_path: Path, monkeypatch: Any) -> None:
    model, _ = exported
    export_onnx(model, tmp_path, verify=False)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def interrupted(*args: Any, **kwargs: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("neural_layers.models.export.export.travel_along", interrupted)
    with pytest.raises(KeyboardInterrupt):
        export_onnx(build(seed=1), tmp_path, verify=False)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_lengths_are_those_that_the_context_and_the_windows_allow() -> None:
    assert lengths(4096, [1024]) == [1, 2, 63, 64, 65, 128, 1027]
    assert lengths(100, [32]) == [1, 2, 35, 63, 64, 65, 93]
    assert lengths(8, []) == [1]
    assert lengths(5, []) == [1]


def test_models_and_options_that_cannot_be_exported_are_named(tmp_path: Path) -> None:
    classifier = HybridForSequenceClassification(HybridConfig(**SMALL, num_hidden_layers=1, mixers=["mamba"]))
    with pytest.raises(InputError, match="HybridForSequenceClassification cannot be exported; exported are Hybrid"):
        export_onnx(classifier, tmp_path)
    with pytest.raises(InputError, match="quantize='int3' must be None, 'int8', 'int4', 'int8_dynamic', 'int8_static'"):
        export_onnx(build(), tmp_path, quantize="int3")
    model = build(mixers=["attention"])
    model.model.layers[0].mixer.inner.sinks = torch.nn.Parameter(torch.zeros(4))
    with pytest.raises(InputError, match="attention with sinks cannot be exported"):
        export_onnx(model, tmp_path)
    model.model.layers[0].mixer.inner = torch.nn.Identity()
    with pytest.raises(InputError, match=r"Identity \(model.layers.0.mixer.inner\) cannot be exported"):
        export_onnx(model, tmp_path)
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="file is a file; an export needs a folder"):
        export_onnx(build(), tmp_path / "file")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_the_folder_says_what_the_graph_is(exported: Any) -> None:
    _, folder = exported
    assert json.loads((folder / "config.json").read_text())["mixers"] == MIXERS
    assert isinstance(HybridCache(HybridConfig.from_pretrained(folder)), HybridCache)
