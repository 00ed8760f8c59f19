"""Pruning with the other wrappers: quantized weights keep the zeros, adapters leave them, merging is told."""

import copy

import pytest
import torch
from torch import nn

from neural_layers import SwiGLU
from neural_layers.wrappers import (
    LoRAConfig,
    apply_lora,
    fold_lora,
    merge_lora,
    prune,
    quantize,
    shrink,
    unmerge_lora,
)
from neural_layers.wrappers.pruning import (
    apply_masks,
    load_masks,
    mask_of,
    masks,
    restore_masks,
    save_masks,
    unprune,
)


def make_model() -> SwiGLU:
    torch.manual_seed(0)
    return SwiGLU(64, 128)


def make_llama(**fields: int):
    transformers = pytest.importorskip("transformers", reason="needs the extra models")
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=23, **{**sizes, **fields}))


@pytest.mark.parametrize("scheme", ["float16", "bfloat16", "int8_dynamic", "int4", "nf4", "fp4"])
def test_quantized_weights_keep_the_zeros(scheme: str) -> None:
    model = make_model()
    prune(model, "l1", 0.5)
    held = {name: mask.clone() for name, mask in masks(model).items()}
    quantize(model, scheme)
    for name, mask in held.items():
        layer = model.get_submodule(name)
        dense = layer.dense_weight() if hasattr(layer, "dense_weight") else layer.weight
        assert (dense[~mask] == 0).all()
        assert (dense[mask] != 0).any()


def test_what_is_quantized_is_not_pruned() -> None:
    model = make_model()
    quantize(model, "nf4")
    with pytest.raises(ValueError, match=r"no layer of kinds=\('linear',\) to prune \(gate_proj: Linear4bit holds"):
        prune(model, "l1", 0.5)
    with pytest.raises(ValueError, match="gate_proj is a Linear4bit"):
        shrink(model, {"feed_forward": 0.5})


def test_adapters_train_over_pruned_weights_and_merging_keeps_the_zeros_and_tells() -> None:
    model = make_model()
    prune(model, "l1", 0.5)
    apply_lora(model, LoRAConfig(r=4, target_modules=("up_proj", "down_proj")))
    base = model.up_proj.base_layer
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.1)
    before = base.weight.detach().clone()
    for _ in range(3):
        optimizer.zero_grad()
        model(torch.randn(4, 64)).square().mean().backward()
        optimizer.step()
    assert torch.equal(base.weight, before)
    exact = model.up_proj.weight.detach().double()
    report = merge_lora(model)
    merged = model.up_proj.base_layer
    assert (merged.weight[~mask_of(base)] == 0).all()
    lost = (merged.weight.double() - exact).norm() / exact.norm()
    assert report.errors["up_proj"] == pytest.approx(float(lost))
    assert lost > 0.01, "ΔW is dense"
    x = torch.randn(4, 64)
    with torch.no_grad():
        expected, found = model.up_proj.weight @ x.T, model.up_proj(x).T
    torch.testing.assert_close(found, expected)
    assert apply_masks(model) == 0


def test_masks_forgotten_over_a_merge_leave_the_layer_below_as_it_was() -> None:
    model = make_model()
    prune(model, "l1", 0.5)
    apply_lora(model, LoRAConfig(r=4, target_modules=("up_proj",)))
    base = model.up_proj.base_layer
    held = mask_of(base).clone()
    merge_lora(model)
    unprune(model)
    unmerge_lora(model)
    assert model.up_proj.base_layer is base
    base.weight = nn.Parameter(torch.randn_like(base.weight))
    model(torch.randn(2, 64))
    assert (base.weight[~held] == 0).all(), "the mask of the restored layer holds"


@pytest.mark.parametrize("scheme", ["nf4", "int8_dynamic", "bfloat16"])
def test_a_pruned_and_quantized_model_runs(scheme: str) -> None:
    model = make_model()
    prune(model, "l1", 0.5)
    x = torch.randn(3, 64)
    expected = model(x)
    quantize(model, scheme)
    assert (model(x) - expected).norm() < 0.3 * expected.norm()


def test_masks_are_saved_by_the_names_of_the_plain_layers(tmp_path) -> None:
    model = make_llama()
    apply_lora(model, LoRAConfig(r=2, target_modules=("q_proj",)))
    prune(model, "l1", 0.5)
    held = {name.replace(".base_layer", ""): mask.clone() for name, mask in masks(model).items()}
    save_masks(model, tmp_path / "masks")
    fold_lora(model)
    model.save_pretrained(tmp_path / "model")
    for wrap in (False, True):
        for restore in (restore_masks, lambda loaded: load_masks(loaded, tmp_path / "masks")):
            loaded = type(model).from_pretrained(tmp_path / "model")
            if wrap:
                apply_lora(loaded, LoRAConfig(r=2, target_modules=("q_proj",)))
            restore(loaded)
            found = {name.replace(".base_layer", ""): mask for name, mask in masks(loaded).items()}
            assert found.keys() == held.keys()
            assert all(torch.equal(found[name], held[name]) for name in held)


def test_an_adapter_elsewhere_in_a_model_with_a_config_is_told() -> None:
    model = make_llama()
    apply_lora(model, LoRAConfig(r=2, target_modules=("q_proj",)))
    with pytest.raises(ValueError, match=r"self_attn.q_proj carries an adapter, which no config describes; fold_lora"):
        shrink(model, {"feed_forward": 0.5})


def test_a_config_that_refuses_the_new_width_is_told_in_one_line() -> None:
    model = make_llama(hidden_size=40, num_attention_heads=5, num_key_value_heads=5)
    before = [p.shape for p in model.parameters()]
    with pytest.raises(
        ValueError, match=r"LlamaConfig cannot describe .*not a multiple of the number of attention"
    ) as e:
        shrink(model, {"kv_heads": 0.4})
    assert "\n" not in str(e.value)
    assert [p.shape for p in model.parameters()] == before


def test_the_layer_within_an_adapter_is_pruned_and_the_adapter_is_not() -> None:
    model = make_model()
    apply_lora(model, LoRAConfig(r=4, target_modules=("up_proj",)))
    report = prune(model, "l1", 0.5)
    assert sorted(layer.name for layer in report.layers) == ["down_proj", "gate_proj", "up_proj.base_layer"]
    with pytest.raises(ValueError, match="up_proj carries an adapter; fold_lora, shrink"):
        shrink(model, {"feed_forward": 0.5})


def test_a_shrunken_model_is_quantized_as_any_other() -> None:
    model = make_model()
    shrink(model, {"feed_forward": 0.5})
    small = copy.deepcopy(model)
    quantize(small, "int8_dynamic")
    x = torch.randn(5, 64)
    assert (small(x) - model(x)).norm() < 0.05 * model(x).norm()
    assert isinstance(model.up_proj, nn.Linear)
