"""Adapters in the weights: how exact, how they come out again, and what is refused."""

import pytest
import torch
from torch import nn

from neural_layers.linear_4bit import Linear4bit
from neural_layers.linear_int4 import LinearInt4
from neural_layers.linear_int8 import LinearInt8
from neural_layers.models.cvm import CVMConfig, CVMForConditionalGeneration
from neural_layers.models.hybrid import HybridForCausalLM
from neural_layers.quantized_embedding import Embedding4bit, EmbeddingInt4, EmbeddingInt8
from neural_layers.wrappers.lora import (
    LoRAConfig,
    apply_lora,
    disable_adapters,
    fold_lora,
    merge_lora,
    remove_adapter,
    set_adapter,
    unmerge_lora,
)
from neural_layers.wrappers.quantization import quantize
from tests.wrappers.lora.samples import everywhere, hybrid, tokens, trained

ROUNDING = {torch.float64: 0.0, torch.float32: 6e-8, torch.bfloat16: 4e-3}


def bits(model):
    return {key: value.clone() for key, value in model.state_dict().items()}


@pytest.mark.parametrize("dtype", ROUNDING)
@pytest.mark.parametrize("dora", [False, True])
def test_float_weights_are_rounded_once_and_come_back_to_their_bits(dtype, dora) -> None:
    model, ids = hybrid(dtype=dtype), tokens()
    trained(model, everywhere(use_dora=dora))
    before, expected = bits(model), model(ids).logits
    report = merge_lora(model)
    assert set(report.errors) == {n.removesuffix(".base_layer") for n, _ in model.named_modules() if "base_l" in n}
    assert report.worst <= ROUNDING[dtype]
    assert (report.worst > 0) == (dtype != torch.float64)
    near = {torch.float64: 1e-11, torch.float32: 1e-5, torch.bfloat16: 0.1}[dtype]
    torch.testing.assert_close(model(ids).logits, expected, rtol=near, atol=near)
    assert unmerge_lora(model).worst == 0
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert torch.equal(model(ids).logits, expected)


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "int8", "static int8", "int4"])
def test_quantized_weights_are_quantized_again_and_come_back_to_their_bits(kind, nested) -> None:
    torch.manual_seed(0)
    plain, table = nn.Linear(96, 33), nn.Embedding(50, 64)
    make = {
        "nf4": lambda: (Linear4bit.from_linear(plain, "nf4", 64, nested), Embedding4bit.from_embedding(table)),
        "int8": lambda: (LinearInt8.from_linear(plain), EmbeddingInt8.from_embedding(table)),
        "static int8": lambda: (LinearInt8.from_linear(plain), EmbeddingInt8.from_embedding(table)),
        "int4": lambda: (LinearInt4.from_linear(plain, 32), EmbeddingInt4.from_embedding(table)),
    }[kind]
    model = nn.ModuleDict(dict(zip(("linear", "table"), make(), strict=True)))
    if kind == "static int8":
        model["linear"].calibrate(0.05, 128)
    trained(model, LoRAConfig(r=4, target_modules=("linear", "table")))
    before = bits(model)
    exact = {name: layer.weight.double() for name, layer in model.items()}
    report = merge_lora(model)
    for name, layer in model.items():
        off = (layer.base_layer.dense_weight().double() - exact[name]).square().mean().sqrt()
        assert report.errors[name] == pytest.approx((off / exact[name].square().mean().sqrt()).item(), rel=1e-4)
        assert type(layer.base_layer) is type(layer.merged.original)
        assert layer.base_layer.dense_weight().shape == exact[name].shape
    low, high = (0.002, 0.02) if "int8" in kind else (0.04, 0.15)
    assert low < report.worst < high
    assert str(report).startswith(f"{type(model['linear'].base_layer).__name__}: 1 layers, relative error")
    if kind == "static int8":
        assert model["linear"].base_layer.static
    unmerge_lora(model)
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(value, before[key]) for key, value in after.items())


def test_a_merge_is_made_once_and_nothing_is_switched_meanwhile() -> None:
    model, ids = hybrid(), tokens()
    trained(model, LoRAConfig(r=2), "a")
    with pytest.raises(ValueError, match="nothing is merged"):
        unmerge_lora(model)
    merge_lora(model)
    merged = model(ids).logits
    for change in (
        lambda: merge_lora(model),
        lambda: set_adapter(model, "a"),
        lambda: remove_adapter(model, "a"),
        lambda: disable_adapters(model).__enter__(),
        lambda: fold_lora(model, "a"),
    ):
        with pytest.raises(ValueError, match="merged"):
            change()
    assert torch.equal(model(ids).logits, merged)
    with pytest.raises(ValueError, match=r"'a' is merged into .*q_proj already; unmerge_lora"):
        merge_lora(model)


def test_a_merge_of_named_adapters_leaves_the_others_out() -> None:
    model, ids = hybrid(), tokens()
    trained(model, LoRAConfig(r=2, target_modules=("q_proj", "in_proj")), "a")
    trained(model, LoRAConfig(r=2, target_modules=("q_proj", "o_proj")), "b", seed=2)
    set_adapter(model, {"a": 0.5})
    expected = model(ids).logits
    set_adapter(model, ["a", "b"])
    merge_lora(model, {"a": 0.5})
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-11, atol=1e-11)


def test_merged_models_move_and_what_comes_back_has_moved_too() -> None:
    model, ids = hybrid(dtype=torch.float32), tokens()
    trained(model, LoRAConfig(r=2))
    expected = model(ids).logits
    merge_lora(model)
    model.double()
    unmerge_lora(model)
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    torch.testing.assert_close(model(ids).logits.float(), expected, rtol=1e-5, atol=1e-5)


def test_folding_leaves_plain_modules() -> None:
    model, ids = hybrid(), tokens()
    names = [(name, type(module)) for name, module in model.named_modules()]
    trained(model, everywhere(use_dora=True))
    expected = model(ids).logits
    report = fold_lora(model)
    assert report.errors
    assert [(name, type(module)) for name, module in model.named_modules()] == names
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-11, atol=1e-11)


def test_what_was_quantized_after_a_merge_is_not_unmerged_into_something_else() -> None:
    model, ids = hybrid(hidden_size=64, mamba2_head_dim=16), tokens()
    trained(model, LoRAConfig(r=2))
    merge_lora(model)
    quantize(model, "nf4")
    quantized = model(ids).logits
    with pytest.raises(ValueError, match="q_proj was made a Linear4bit after the merge"):
        unmerge_lora(model)
    fold_lora(model)
    assert torch.equal(model(ids).logits, quantized)


def test_a_merge_without_the_original_cannot_be_undone() -> None:
    model = hybrid()
    trained(model, LoRAConfig(r=2))
    merge_lora(model, restorable=False)
    with pytest.raises(ValueError, match="restorable=False"):
        unmerge_lora(model)
    fold_lora(model)


@pytest.mark.parametrize("target", ["embed_tokens", "lm_head"])
def test_a_tied_weight_is_parted_only_where_that_is_asked_for(target, tmp_path) -> None:
    model, ids = hybrid(tie=True), tokens()
    trained(model, LoRAConfig(r=3, target_modules=(target, "q_proj")))
    expected, before = model(ids).logits, bits(model)
    with pytest.raises(ValueError, match=rf"{target} is also that of .*(lm_head|embed_tokens).*untie=True"):
        merge_lora(model)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    merge_lora(model, untie=True)
    torch.testing.assert_close(model(ids).logits, expected, rtol=1e-11, atol=1e-11)
    unmerge_lora(model)
    assert model.config.tie_word_embeddings
    fold_lora(model, untie=True)
    assert not model.config.tie_word_embeddings
    model.save_pretrained(tmp_path)
    loaded = HybridForCausalLM.from_pretrained(tmp_path, dtype=torch.float64).eval()
    torch.testing.assert_close(loaded(ids).logits, expected, rtol=1e-11, atol=1e-11)


def test_a_translators_four_tied_places_are_handled_as_one(tmp_path) -> None:
    torch.manual_seed(0)
    config = CVMConfig(
        vocab_size=30, hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2,
        num_decoder_layers=1, max_position_embeddings=32,
    )  # fmt: skip
    model = CVMForConditionalGeneration(config).eval()
    call = {"input_ids": tokens(2, 5) % 30, "decoder_input_ids": tokens(2, 4, seed=1) % 30}
    before = model(**call).logits
    trained(model, LoRAConfig(r=2, target_modules=("shared",)))
    assert model.encoder.embed_tokens is model.decoder.embed_tokens is model.shared
    expected = model(**call).logits
    assert (expected - before).abs().max() > 1e-3
    fold_lora(model, untie=True)
    torch.testing.assert_close(model(**call).logits, expected, rtol=1e-5, atol=1e-5)
    model.save_pretrained(tmp_path)
    loaded = CVMForConditionalGeneration.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(loaded(**call).logits, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("value", "message"), [(float("nan"), "not finite"), (1e30, "beyond the range of .*float16")])
def test_a_weight_that_cannot_be_is_not_merged(value, message) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).half()
    apply_lora(model, LoRAConfig(r=1, target_modules="all-linear"))
    with torch.no_grad():
        model[1].adapters["default"].lora_A.fill_(1)
        model[1].adapters["default"].lora_B.fill_(value)
    before = bits(model)
    with pytest.raises(ValueError, match=message):
        merge_lora(model)
    assert str(bits(model)) == str(before)
    assert model[0].merged is None


@pytest.mark.parametrize("scheme", ["int8_dynamic", "nf4", "int4"])
def test_a_quantized_tied_weight_that_was_parted_is_saved_twice(scheme, tmp_path) -> None:
    model = hybrid(tie=True, dtype=torch.float32, hidden_size=64)
    quantize(model, scheme)
    trained(model, LoRAConfig(r=2, target_modules=("embed_tokens",)))
    fold_lora(model, untie=True)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert torch.equal(loaded(tokens()).logits, model(tokens()).logits)
