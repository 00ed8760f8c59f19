"""Pruning with the other wrappers: quantized weights keep the zeros, adapters leave them, merging is told."""

import copy

import pytest
import torch
from torch import nn

from neural_layers import SwiGLU
from neural_layers.wrappers import LoRAConfig, apply_lora, merge_lora, prune, quantize, shrink
from neural_layers.wrappers.pruning import apply_masks, mask_of, masks


def make_model() -> SwiGLU:
    torch.manual_seed(0)
    return SwiGLU(64, 128)


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


def test_adapters_train_over_pruned_weights_and_merging_is_masked_again() -> None:
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
    merge_lora(model)
    assert apply_masks(model) > 0, "ΔW is dense: merged, it fills the zeros, until the masks are applied"
    assert (base.weight[~mask_of(base)] == 0).all()


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
