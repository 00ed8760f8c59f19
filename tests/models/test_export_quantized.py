"""Exported graphs of models with quantized layers: equal to PyTorch at all lengths, of every scheme and mixed."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from torch import nn

from neural_layers.errors import InputError
from neural_layers.linear import Linear
from neural_layers.models.cvm import CVMConfig, CVMForConditionalGeneration
from neural_layers.models.export import OnnxModel, export_onnx
from neural_layers.models.hybrid import HybridConfig, HybridForCausalLM
from neural_layers.wrappers.quantization import Plan, quantize

MIXERS = ["mamba", "mamba2", "attention"]
# 40 wide: rows of 40 weights share blocks of 64 with the next row, and groups of 64 are not filled.
SMALL = {"vocab_size": 96, "hidden_size": 40, "intermediate_size": 96, "num_attention_heads": 5, "mamba2_head_dim": 16}
KEYS = {"num_key_value_heads": 1, "max_position_embeddings": 200}


def hybrid(**overrides: Any) -> HybridForCausalLM:
    """A small model whose weights are all in play."""
    mixers = overrides.pop("mixers", MIXERS)
    torch.manual_seed(0)
    config = HybridConfig(**{**SMALL, **KEYS, "mixers": mixers, "num_hidden_layers": len(mixers), **overrides})
    return perturbed(HybridForCausalLM(config))


def translator(**overrides: Any) -> CVMForConditionalGeneration:
    torch.manual_seed(0)
    sizes = {"vocab_size": 80, "hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    layers = {"num_hidden_layers": 2, "num_decoder_layers": 2, "max_position_embeddings": 140}
    return perturbed(CVMForConditionalGeneration(CVMConfig(**{**sizes, **layers, **overrides})))


def perturbed(model: Any) -> Any:
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.05)
    return model.eval()


SCHEMES: dict[str, dict[str, Any]] = {
    "float16": {"scheme": "float16"},
    "bfloat16": {"scheme": "bfloat16"},
    "int8_dynamic": {"scheme": "int8_dynamic"},
    "int8_static": {"scheme": "int8_static"},
    "int4": {"scheme": "int4"},
    "int4 in groups of 32": {"scheme": "int4", "block_size": 32},
    "nf4": {"scheme": "nf4"},
    "nf4, double": {"scheme": "nf4", "double_quant": True},
    "fp4": {"scheme": "fp4", "block_size": 32},
    "nf4 in blocks of 1024": {"scheme": "nf4", "block_size": 1024},
}
# Measured: 2e-6 of the largest logit where activations stay float32, else 3 % (int4) of the root mean square.
LARGEST = {"int8": 0.02, "int4": 0.1}


def quantized(model: Any, scheme: str) -> Any:
    """The model with every layer quantized, its tied head and table too."""
    arguments = dict(SCHEMES[scheme])
    if scheme == "int8_static":
        ids = torch.randint(80, (3, 30), generator=torch.Generator().manual_seed(1))
        decoder = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
        arguments["calibration"] = [{"input_ids": ids, **decoder}]
    quantize(model, **arguments)
    return model


@pytest.mark.parametrize(
    ("build", "scheme"),
    [*((hybrid, scheme) for scheme in SCHEMES), *((translator, scheme) for scheme in ("int8_static", "int4", "nf4"))],
)
def test_quantized_models_compute_as_in_pytorch_at_all_lengths(build: Any, scheme: str, tmp_path: Path) -> None:
    model = quantized(build(), scheme)
    checks = export_onnx(model, tmp_path)
    assert {1, 2, 63, 64, 65, 128} <= {check.length for check in checks}
    assert max(check.error for check in checks) < LARGEST.get(scheme[:4], 2e-5)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_tied_table_is_stored_once_and_read_by_the_head(scheme: str, tmp_path: Path) -> None:
    model = quantized(hybrid(mixers=["attention"], vocab_size=500), scheme)
    export_onnx(model, tmp_path, verify=False)
    weights = onnx.load(tmp_path / "model.onnx").graph.initializer
    stored = {weight.name: weight for weight in weights if "embed_tokens" in weight.name or "lm_head" in weight.name}
    table = stored.pop("model.embed_tokens.weight")
    assert len(table.raw_data) <= 500 * 64 * (2 if "float" in scheme else 1)
    assert sum(len(weight.raw_data) for weight in stored.values()) < 0.3 * len(table.raw_data)


def test_plain_and_quantized_layers_of_all_kinds_stand_side_by_side(tmp_path: Path) -> None:
    """As a progressive plan leaves them; here each projection of a group that shares a product is another."""
    model, layers = translator(vocab_size=90), dict[str, dict[str, Any]]()
    schemes = [{"scheme": "float32"}, *(SCHEMES[name] for name in SCHEMES if name != "int8_static")]
    linears = [name for name, module in model.named_modules() if type(module) is Linear and name != "lm_head"]
    layers = {name: schemes[i % len(schemes)] for i, name in enumerate(linears)}
    quantize(model, Plan({name: entry for name, entry in layers.items() if entry["scheme"] != "float32"}))
    assert len({type(module) for name, module in model.named_modules() if name in layers}) == 5
    assert max(check.error for check in export_onnx(model, tmp_path)) < 0.1
    kinds = {node.op_type for node in onnx.load(tmp_path / "decoder.onnx").graph.node}
    assert kinds >= {"MatMul", "MatMulBnb4", "MatMulNBits", "MatMulInteger"}


def test_a_4_bit_hybrid_decodes_with_state_as_pytorch_does(tmp_path: Path) -> None:
    model = quantized(hybrid(), "nf4, double")
    export_onnx(model, tmp_path, verify=False)
    ids = torch.randint(96, (2, 70))
    wanted = model.generate(ids, max_new_tokens=40, do_sample=False, eos_token_id=None)
    served = OnnxModel(tmp_path, threads=1)
    np.testing.assert_array_equal(served.generate(ids, max_new_tokens=40, eos_token_id=None), wanted.numpy())


def test_quantizing_twice_and_unknown_layers_are_refused(tmp_path: Path) -> None:
    model = quantized(hybrid(mixers=["attention"]), "nf4")
    message = r"quantize='int8' is for a float model, and model.embed_tokens is a Embedding4bit; leave quantize out"
    with pytest.raises(InputError, match=message):
        export_onnx(model, tmp_path, quantize="int8")

    class Prepared(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x) * 2

    model = hybrid(mixers=["attention"])
    model.model.layers[0].mixer.inner.q_proj = Prepared(40, 40)
    with pytest.raises(
        InputError, match=r"Prepared \(model.layers.0.*q_proj\) cannot be exported; exported are Linear, "
    ):
        export_onnx(model, tmp_path)
    assert not list(tmp_path.iterdir())
