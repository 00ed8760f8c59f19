"""Several adapters of one model: switched, weighed, disabled, one for each row; and what runs through them."""

import copy

import pytest
import torch
from torch import nn

from neural_layers.errors import InputError
from neural_layers.wrappers.lora import (
    LoRAConfig,
    adapter_names,
    adapter_rows,
    apply_lora,
    disable_adapters,
    merge_lora,
    remove_adapter,
    set_adapter,
)
from tests.wrappers.lora.samples import everywhere, hybrid, tokens, trained

TIGHT = {"rtol": 1e-11, "atol": 1e-11}


def with_two(**fields):
    """A model with adapters "a" (everywhere) and "b" (DoRA, elsewhere another rank), and the outputs of each alone."""
    model, ids = hybrid(**fields), tokens()
    outputs = {None: model(ids).logits}
    trained(model, everywhere(), "a", seed=1)
    outputs["a"] = model(ids).logits
    trained(model, LoRAConfig(r=2, target_modules=("in_proj", "conv1d", "embed_tokens"), use_dora=True), "b", seed=2)
    outputs["b"] = model(ids).logits
    return model, ids, outputs


def weights(model):
    """The dense weight in use of every wrapped layer."""
    return {n: m.weight.detach().clone() for n, m in model.named_modules() if hasattr(m, "base_layer")}


def test_adapters_are_switched_disabled_and_removed() -> None:
    model, ids, outputs = with_two()
    assert adapter_names(model) == ("a", "b")
    for name in ("a", "b", "a"):
        set_adapter(model, name)
        assert torch.equal(model(ids).logits, outputs[name])
        trains = {
            n.partition(".adapters.")[2].partition(".")[0] for n, p in model.named_parameters() if p.requires_grad
        }
        assert trains == {name}
        with disable_adapters(model):
            assert torch.equal(model(ids).logits, outputs[None])
        assert torch.equal(model(ids).logits, outputs[name])
    set_adapter(model, "b", trainable=False)
    assert not any(p.requires_grad for p in model.parameters())
    remove_adapter(model, "a")
    assert torch.equal(model(ids).logits, outputs["b"])
    assert len([m for m in model.modules() if hasattr(m, "base_layer")]) == 5
    remove_adapter(model, "b")
    assert torch.equal(model(ids).logits, outputs[None])
    assert not any(hasattr(m, "base_layer") for m in model.modules())


def test_adapters_are_weighed_by_what_each_changes_of_the_weight() -> None:
    model, ids, _ = with_two()
    changes = {}
    with disable_adapters(model):
        plain = weights(model)
    for name in ("a", "b"):
        set_adapter(model, name)
        changes[name] = {key: w - plain[key] for key, w in weights(model).items()}
    set_adapter(model, {"a": 0.25, "b": -2.0})
    for key, weight in weights(model).items():
        torch.testing.assert_close(weight, plain[key] + 0.25 * changes["a"][key] - 2 * changes["b"][key])
    weighed = model(ids).logits
    merge_lora(model)
    torch.testing.assert_close(model(ids).logits, weighed, **TIGHT)


@pytest.mark.parametrize("tie", [False, True])
def test_each_row_of_a_batch_has_its_own_adapter(tie) -> None:
    model, ids, outputs = with_two(tie=tie)
    for names in (["a", None, "b"], ["b", "b", "a"], [None, None, None]):
        with adapter_rows(model, names):
            rows = model(ids).logits
        for i, name in enumerate(names):
            torch.testing.assert_close(rows[i], outputs[name][i], **TIGHT)
    assert torch.equal(model(ids).logits, outputs["b"])


def test_rows_of_adapters_have_the_gradients_of_each_alone_checkpointed_too() -> None:
    model, ids, _ = with_two()
    names = ["b", "a", "b"]
    gradients = []
    for name in ("a", "b"):
        set_adapter(model, name)
        own = [i for i, other in enumerate(names) if other == name]
        model(ids[own]).logits.square().sum().backward()
    gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    for checkpointing in (False, True):
        model.zero_grad()
        set_adapter(model, ["a", "b"])
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
            model.train()
        with adapter_rows(model, names):
            model(ids).logits.square().sum().backward()
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
    for other in gradients[1:]:
        assert other.keys() == gradients[0].keys()
        for name, gradient in other.items():
            torch.testing.assert_close(gradient, gradients[0][name], rtol=1e-8, atol=1e-8)


def test_a_backward_pass_that_would_compute_another_model_again_is_refused() -> None:
    model, ids, _ = with_two()
    model.train().activation_checkpointing_enable({"use_reentrant": False})
    with adapter_rows(model, ["a", "b", None]):
        loss = model(ids).logits.sum()
    with pytest.raises(RuntimeError, match=r"adapters in use changed .* call backward\(\) inside"):
        loss.backward()


def test_rows_that_do_not_fit_are_refused() -> None:
    model, ids, outputs = with_two()
    with pytest.raises(ValueError, match="names 2 rows, and a layer's input has 3"), adapter_rows(model, ["a", None]):
        model(ids)
    with pytest.raises(ValueError, match=r"no adapter 'c'; there are 'a', 'b'"), adapter_rows(model, ["c", "a", "a"]):
        pass
    with pytest.raises(ValueError, match="got no names"), adapter_rows(model, []):
        pass
    with pytest.raises(ValueError, match="no one weight"), adapter_rows(model, ["a", None, None]):
        model(ids, labels=ids)
    with adapter_rows(model, ["a", "a", "a"]), pytest.raises(ValueError, match="leave the block"):
        remove_adapter(model, "a")
    for block in (adapter_rows(model, ["a", "a", "a"]), disable_adapters(model)):
        with block, pytest.raises(ValueError, match="leave that block before another is added"):
            apply_lora(model, LoRAConfig(r=1), "c")
    assert torch.equal(model(ids).logits, outputs["b"])


def test_what_is_no_adapter_or_no_weight_is_refused() -> None:
    model, _, _ = with_two()
    with pytest.raises(ValueError, match="no adapter 'aa'; there are 'a'"):
        set_adapter(model, "aa")
    with pytest.raises(ValueError, match="weight of adapter 'a' is inf"):
        set_adapter(model, {"a": float("inf")})
    with pytest.raises(ValueError, match="has no adapters; apply_lora"):
        set_adapter(hybrid(), "a")


@pytest.mark.parametrize("dora", [False, True])
def test_dropout_acts_on_the_inputs_of_the_adapter_alone(dora) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.Conv1d(1, 2, 3)).double()
    trained(model, LoRAConfig(r=2, dropout=0.5, target_modules=("0", "1"), use_dora=dora))
    model.train()
    for layer, x in zip(model, (torch.randn(3, 6), torch.randn(3, 1, 6)), strict=True):
        x = x.double()
        torch.manual_seed(1)
        out = layer(x)
        torch.manual_seed(1)
        seen = nn.functional.dropout(x, 0.5)
        change = copy.deepcopy(layer.base_layer)
        change.weight.data = layer.change(layer.adapters["default"], layer.base_layer.weight).detach()
        change.bias = None
        torch.testing.assert_close(out, layer.base_layer(x) + change(seen))
    with pytest.raises(ValueError, match="dropout of its adapter"):
        model[0].dense_weight()
    assert model.eval()[0].dense_weight().shape == (4, 6)


def test_dropout_of_a_mixers_convolution_spares_what_the_adapter_does_not_see() -> None:
    model, ids = hybrid(), tokens()
    apply_lora(model, LoRAConfig(r=3, dropout=0.3, target_modules=("conv1d",)))
    expected = model(ids).logits
    torch.testing.assert_close(model.train()(ids).logits, expected, **TIGHT)  # B is zero still


def test_generation_with_a_cache_is_that_of_the_merged_model() -> None:
    model, ids = hybrid(), tokens(2, 5)
    trained(model, everywhere())
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    written = model.generate(ids, **options)
    uncached = model.generate(ids, use_cache=False, **options)
    merge_lora(model)
    assert torch.equal(written, uncached)
    assert torch.equal(written, model.generate(ids, **options))


def test_rows_of_adapters_generate_as_each_alone() -> None:
    model, ids, _ = with_two()
    options = {"max_new_tokens": 4, "do_sample": False, "pad_token_id": 0}
    with adapter_rows(model, ["a", None, "b"]):
        rows = model.generate(ids, **options)
    set_adapter(model, "a")
    assert torch.equal(rows[0], model.generate(ids[:1], **options)[0])
    set_adapter(model, "b")
    assert torch.equal(rows[2], model.generate(ids[2:], **options)[0])


@pytest.mark.parametrize("dora", [False, True])
def test_a_model_with_adapters_is_captured_as_one_graph(dora) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Embedding(9, 6), nn.Linear(6, 5), nn.ReLU(), nn.Linear(5, 4)).double()
    trained(model, LoRAConfig(r=2, target_modules=("0", "1", "3"), use_dora=dora))
    ids = torch.tensor([[1, 2, 8], [0, 3, 3]])
    captured = torch.compile(model, backend="aot_eager", fullgraph=True)
    gradients = []
    for call in (model, captured):
        model.zero_grad()
        out = call(ids)
        out.square().sum().backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    torch.testing.assert_close(captured(ids), model(ids))
    torch.testing.assert_close(gradients[0], gradients[1])


def test_checkpointed_gradients_are_those_without(tmp_path) -> None:
    model, ids = hybrid(), tokens()
    trained(model, everywhere(r=2))
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            model.activation_checkpointing_enable({"use_reentrant": False})
        model.train().zero_grad()
        model(ids, labels=ids).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    torch.testing.assert_close(*gradients, **TIGHT)


def test_reentrant_checkpointing_finds_something_to_train() -> None:
    transformers = pytest.importorskip("transformers", reason="a model with reentrant checkpointing")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=23, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4
    )
    model = transformers.LlamaForCausalLM(config).train()
    model.activation_checkpointing_enable({"use_reentrant": True})
    apply_lora(model, LoRAConfig(r=2))
    model(tokens(), labels=tokens()).loss.backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_copies_are_independent() -> None:
    model, ids, outputs = with_two()
    twin = copy.deepcopy(model)
    set_adapter(twin, "a")
    assert torch.equal(twin(ids).logits, outputs["a"])
    assert torch.equal(model(ids).logits, outputs["b"])


def test_an_adapter_on_another_device_than_its_base_is_refused() -> None:
    layer = nn.Sequential(nn.Linear(6, 4))
    apply_lora(layer, LoRAConfig(r=2, target_modules=("0",)))
    layer[0].adapters.to("meta")
    with pytest.raises(InputError, match=r"an adapter lies on meta and its base on cpu; move both: model.to\('cpu'\)"):
        layer(torch.ones(1, 6))
    with pytest.raises(InputError, match="an adapter lies on meta"):
        merge_lora(layer)
    assert layer[0].merged is None
