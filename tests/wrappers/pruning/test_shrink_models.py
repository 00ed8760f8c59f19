"""Models of transformers whose units are removed: logits, config, files, decoding with a cache."""

import copy

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from neural_layers.models.cvm import CVMConfig, CVMForConditionalGeneration
from neural_layers.models.hybrid import HybridCache, HybridConfig, HybridForCausalLM
from neural_layers.wrappers import plan_shrink, shrink
from neural_layers.wrappers.pruning import mask_units

SIZES = {"vocab_size": 24, "hidden_size": 16, "intermediate_size": 20, "num_attention_heads": 4}


def make_hybrid(**changes) -> HybridForCausalLM:
    mixers = ["mamba", "mamba2", "attention", "mamba2"]
    own = {"num_key_value_heads": 2, "num_hidden_layers": 4, "mamba2_head_dim": 4, "mamba2_n_groups": 2}
    return HybridForCausalLM(HybridConfig(**{**SIZES, **own, "mixers": mixers, "mamba2_d_state": 6, **changes}))


def make_cvm() -> CVMForConditionalGeneration:
    return CVMForConditionalGeneration(CVMConfig(**SIZES, num_key_value_heads=2, num_hidden_layers=2))


def make_llama() -> LlamaForCausalLM:
    own = {"num_key_value_heads": 2, "num_hidden_layers": 2, "attention_bias": True, "mlp_bias": True}
    return LlamaForCausalLM(LlamaConfig(**SIZES, **own))


def make_qwen3() -> Qwen3ForCausalLM:
    return Qwen3ForCausalLM(Qwen3Config(**SIZES, num_key_value_heads=2, num_hidden_layers=2, head_dim=6))


CASES = [
    (make_hybrid, "feed_forward", 0.4, {"intermediate_size": 12}),
    (make_hybrid, "kv_heads", 0.5, {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 4}),
    (make_hybrid, "query_heads", 0.5, {"num_attention_heads": 2, "num_key_value_heads": 2}),
    (make_hybrid, "mamba", 0.3, {"mamba_inner_size": 22}),
    (make_hybrid, "mamba2", 0.25, {}),
    (make_cvm, "feed_forward", 0.4, {"intermediate_size": 12}),
    (make_cvm, "kv_heads", 0.5, {"num_key_value_heads": 1}),
    (make_cvm, "query_heads", 0.5, {"num_attention_heads": 2}),
    (make_llama, "feed_forward", 0.4, {"intermediate_size": 12}),
    (make_llama, "kv_heads", 0.5, {"num_key_value_heads": 1}),
    (make_llama, "query_heads", 0.5, {"num_attention_heads": 2}),
    (make_qwen3, "query_heads", 0.5, {"num_attention_heads": 2, "head_dim": 6}),
]


def logits(model, ids: torch.Tensor) -> torch.Tensor:
    return model(ids, labels=ids).logits


@pytest.mark.parametrize(("make", "kind", "amount", "fields"), CASES, ids=lambda v: getattr(v, "__name__", str(v)))
def test_a_shrunken_model_equals_the_masked_one_and_survives_its_file(make, kind, amount, fields, tmp_path) -> None:
    torch.manual_seed(0)
    model = make().double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    ids = torch.randint(3, 24, (2, 9))
    masked, plan = copy.deepcopy(model), plan_shrink(model, {kind: amount})
    mask_units(masked, plan)
    before = logits(model, ids)
    shrink(model, plan)
    found = logits(model, ids)
    torch.testing.assert_close(found, logits(masked, ids), rtol=1e-10, atol=1e-11)
    assert (found - before).abs().max() > 1e-3
    assert {name: getattr(model.config, name) for name in fields} == fields

    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path, dtype=torch.float64).eval()
    torch.testing.assert_close(logits(loaded, ids), found, rtol=1e-12, atol=1e-13)
    assert all(torch.equal(p, loaded.state_dict()[name]) for name, p in model.state_dict().items())
    decode = {"max_new_tokens": 5, "do_sample": False, "eos_token_id": None}
    assert torch.equal(loaded.generate(ids, **decode), masked.generate(ids, **decode))


def test_the_cache_is_as_narrow_as_the_model() -> None:
    model = make_hybrid().eval()
    shrink(model, {"kv_heads": 0.5, "mamba": 0.5, "mamba2": 0.5})
    ids = torch.randint(0, 24, (1, 6))
    cache = model(ids, use_cache=True).past_key_values
    assert cache.layers[0].recurrent_states[0].shape == (1, 16, 16)
    assert cache.layers[1].recurrent_states[0].shape == (1, 4, 4, 6)
    assert cache.layers[2].keys.shape == (1, 1, 6, 4)
    with pytest.raises(ValueError, match="the cache was made for a model with num_attention_heads=4, not 2"):
        model(ids, past_key_values=HybridCache(make_hybrid().config))


def test_a_config_with_one_width_is_not_given_two() -> None:
    model = make_hybrid()
    before = {name: tuple(p.shape) for name, p in model.named_parameters()}
    with pytest.raises(ValueError, match=r"HybridConfig cannot describe .* intermediate_size=10 \(model.layers.1.feed"):
        shrink(model, {"feed_forward": 0.5}, include=["model.layers.0.*"])
    assert {name: tuple(p.shape) for name, p in model.named_parameters()} == before
    assert model.config.intermediate_size == 20
    plain = model.model.layers[0]  # a block has no config: what becomes of it is the caller's
    shrink(plain, {"feed_forward": 0.5})
    assert plain.feed_forward.inner.up_proj.weight.shape == (10, 16)


def test_layers_of_mamba2_may_differ() -> None:
    model = make_hybrid(mamba2_layers={"1": {"state_dim": 5}})
    shrink(model, {"mamba2": 0.5}, include=["model.layers.1.*"])
    options = model.config.mamba2_layers["1"]
    assert options == {"state_dim": 5, "inner_dim": 16, "norm_eps": 2e-5}
    rebuilt = HybridForCausalLM(HybridConfig.from_dict(model.config.to_dict()))
    rebuilt.load_state_dict(model.state_dict())
    ids = torch.randint(0, 24, (1, 6))
    torch.testing.assert_close(rebuilt.eval()(ids).logits, model.eval()(ids).logits, rtol=1e-6, atol=1e-7)


def test_a_shrunken_model_trains() -> None:
    model = make_hybrid()
    shrink(model, {"feed_forward": 0.5, "query_heads": 0.5, "mamba": 0.5, "mamba2": 0.5})
    ids = torch.randint(0, 24, (2, 8))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
