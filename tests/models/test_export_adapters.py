"""Adapters in exported graphs: merged, or as inputs that other adapters take the place of."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from neural_layers.errors import InputError
from neural_layers.models.export import OnnxModel, OnnxTranslator, export_onnx
from neural_layers.wrappers.lora import LoRAConfig, apply_lora, load_adapter, save_adapter, set_adapter
from neural_layers.wrappers.quantization import quantize
from tests.models.test_export_quantized import hybrid, translator

EVERY = ("q_proj", "v_proj", "o_proj", "in_proj", "x_proj", "down_proj", "lm_head")
IDS = torch.randint(80, (2, 30), generator=torch.Generator().manual_seed(3))


def adapted(model: Any, targets: tuple[str, ...] = EVERY, seed: int = 0, **options: Any) -> Any:
    """The model with an adapter that changes what it computes."""
    apply_lora(model, LoRAConfig(r=3, alpha=6, target_modules=targets, **options))
    torch.manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name or "magnitude" in name:
                parameter.add_(torch.randn_like(parameter), alpha=0.1)
    return model.eval()


def relative(found: Any, wanted: torch.Tensor) -> float:
    return float((torch.from_numpy(found) - wanted).abs().max() / wanted.abs().max())


@pytest.mark.parametrize("lora", ["merged", "inputs"])
@torch.no_grad()
def test_a_model_with_adapters_is_exported_as_it_computes(lora: str, tmp_path: Path) -> None:
    targets = EVERY if lora == "inputs" else EVERY[:-1]  # the head is tied, and merging would change the embedding
    model = adapted(hybrid(), targets)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    checks = export_onnx(model, tmp_path, lora=lora)
    assert max(check.error for check in checks) < 2e-5
    assert relative(OnnxModel(tmp_path, threads=1).forward(IDS)[0], model(IDS).logits) < 2e-5
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    inputs = {given.name for given in onnx.load(tmp_path / "model.onnx").graph.input}
    assert ("model.layers.2.mixer.inner.q_proj.lora_A.weight" in inputs) == (lora == "inputs")


@torch.no_grad()
def test_dora_embeddings_and_convolutions_are_merged(tmp_path: Path) -> None:
    model = adapted(hybrid(tie_word_embeddings=False), ("q_proj", "conv1d", "embed_tokens"), use_dora=True)
    assert max(check.error for check in export_onnx(model, tmp_path)) < 2e-5
    assert relative(OnnxModel(tmp_path, threads=1).forward(IDS)[0], model(IDS).logits) < 2e-5


@torch.no_grad()
def test_another_adapter_takes_the_place_of_the_exported_one(tmp_path: Path) -> None:
    """On 4-bit weights, in a call and through the steps of decoding."""
    model = hybrid()
    quantize(model, "nf4")
    save_adapter(adapted(model, EVERY, seed=1), tmp_path / "other")
    wanted, tokens = model(IDS).logits, model.generate(IDS, max_new_tokens=9, do_sample=False, eos_token_id=None)
    model = hybrid()
    quantize(model, "nf4")
    export_onnx(adapted(model, EVERY, seed=2), tmp_path / "onnx", lora="inputs", verify=False)
    served = OnnxModel(tmp_path / "onnx", threads=1, adapter=tmp_path / "other")
    assert relative(served.forward(IDS)[0], wanted) < 2e-5
    np.testing.assert_array_equal(served.generate(IDS, max_new_tokens=9, eos_token_id=None), tokens.numpy())
    assert relative(OnnxModel(tmp_path / "onnx", threads=1).forward(IDS)[0], wanted) > 0.01


@torch.no_grad()
def test_adapters_of_a_translator_and_several_in_use(tmp_path: Path) -> None:
    model = adapted(translator(), ("q_proj", "k_proj", "up_proj"))
    save_adapter(model, tmp_path / "first")
    apply_lora(model, LoRAConfig(r=2, target_modules=("v_proj", "q_proj")), "second")
    set_adapter(model, {"default": 0.5, "second": 2.0})
    assert max(check.error for check in export_onnx(model, tmp_path / "both", lora="inputs")) < 2e-5
    with pytest.raises(
        InputError, match=r"q_proj.lora_A.weight of the adapter in .* has shape \(3, 32\); the export ta"
    ):
        OnnxTranslator(tmp_path / "both", adapter=tmp_path / "first")
    model = translator()
    load_adapter(model, tmp_path / "first")
    export_onnx(model, tmp_path / "one", lora="inputs", verify=False)
    same = OnnxTranslator(tmp_path / "one", threads=1, adapter=tmp_path / "first")
    own = OnnxTranslator(tmp_path / "one", threads=1)
    ids = IDS[:, :9].numpy()
    np.testing.assert_array_equal(same.generate(ids, max_new_tokens=5), own.generate(ids, max_new_tokens=5))


@pytest.mark.parametrize("scheme", ["int8_static", "int8_dynamic", "int4"])
def test_adapters_stay_float_over_weights_that_the_export_quantizes(scheme: str, tmp_path: Path) -> None:
    sizes = {"hidden_size": 80, "num_attention_heads": 5, "intermediate_size": 96}
    model = adapted(hybrid(**sizes, mixers=["attention"]), ("q_proj", "v_proj", "o_proj", "down_proj", "lm_head"))
    calibration = {"calibration": [IDS]} if scheme == "int8_static" else {}
    checks = export_onnx(model, tmp_path, quantize=scheme, lora="inputs", **calibration)
    assert max(check.error for check in checks) < 0.1
    graph = onnx.load(tmp_path / "model.onnx").graph
    adapters = [weight for weight in graph.initializer if ".lora_" in weight.name]
    assert len(adapters) == 10
    assert {weight.data_type for weight in adapters} == {onnx.TensorProto.FLOAT}


def test_what_cannot_be_an_input_and_what_does_not_fit_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="lora='both' must be one of 'merged', 'inputs'"):
        export_onnx(hybrid(mixers=["attention"]), tmp_path / "out", lora="both")
    with pytest.raises(InputError, match="lora='inputs' is for a model with adapters, and the HybridForCausalLM has"):
        export_onnx(hybrid(mixers=["attention"]), tmp_path / "out", lora="inputs")
    with pytest.raises(InputError, match=r"cannot be for .*q_proj: DoRA scales the weight itself; leave lora out"):
        export_onnx(adapted(hybrid(), ("q_proj",), use_dora=True), tmp_path / "out", lora="inputs")
    with pytest.raises(InputError, match=r"cannot be for .*conv1d: the adapter of .* changes more than a product"):
        export_onnx(adapted(hybrid(), ("conv1d",)), tmp_path / "out", lora="inputs")
    assert not (tmp_path / "out").exists()
    save_adapter(adapted(hybrid(), ("q_proj",)), tmp_path / "few")
    save_adapter(adapted(hybrid(), ("q_proj", "k_proj")), tmp_path / "many")
    export_onnx(hybrid(), tmp_path / "plain", verify=False)
    with pytest.raises(InputError, match="this export has no adapters as inputs; export a model with adapters with"):
        OnnxModel(tmp_path / "plain", adapter=tmp_path / "few")
    export_onnx(adapted(hybrid(), ("q_proj", "v_proj")), tmp_path / "onnx", lora="inputs", verify=False)
    with pytest.raises(InputError, match=r"lacks model.layers.2.mixer.inner.v_proj.lora_A.weight, which the export"):
        OnnxModel(tmp_path / "onnx", adapter=tmp_path / "few")
    with pytest.raises(InputError, match=r"has model.layers.2.mixer.inner.k_proj.lora_A.weight, for which the export"):
        OnnxModel(tmp_path / "onnx", adapter=tmp_path / "many")
