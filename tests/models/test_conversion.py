"""Models of transformers as hybrid models: the same logits, the same tokens."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("transformers", reason="transformers is not installed")

from transformers import LlamaForCausalLM

from neural_layers.models.conversion import from_transformers
from neural_layers.models.hybrid import HybridForCausalLM
from tests.models.peers import VARIANTS, VOCABULARY, make_config, make_peer, transformers_in_float64

LENGTH = 23


def make_ids(batch: int = 2, length: int = LENGTH) -> torch.Tensor:
    return torch.randint(2, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))


def left_padded(batch: int = 3, length: int = 12) -> dict[str, torch.Tensor]:
    ids, mask = make_ids(batch, length), torch.ones(batch, length, dtype=torch.long)
    for row in range(batch):
        ids[row, : 3 * row], mask[row, : 3 * row] = 0, 0
    return {"input_ids": ids, "attention_mask": mask}


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_float32_logits_and_greedy_tokens_are_those_of_transformers(variant) -> None:
    peer = make_peer(variant)
    ours, ids = from_transformers(peer), make_ids()
    expected = peer(ids, use_cache=False).logits
    assert (ours(ids).logits - expected).abs().max() <= 2e-5

    options = {"max_new_tokens": 9, "do_sample": False}
    # transformers forgets the limit of Δ in its one-token step; a bias before its convolution lets padding into it.
    has_step_fault, has_padding_fault = "limited" in variant, variant in ("mamba biases", "mamba2 biases")
    whole = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    tokens = peer.generate(**whole, **options, use_cache=not has_step_fault)
    assert torch.equal(ours.generate(**whole, **options), tokens)

    padded = left_padded()
    real = padded["attention_mask"].bool()
    logits, tokens = ours(**padded).logits, ours.generate(**padded, **options)
    if has_padding_fault:
        for row, mask in enumerate(real):
            alone = padded["input_ids"][row, mask].unsqueeze(0)
            assert (logits[row, mask] - peer(alone, use_cache=False).logits[0]).abs().max() <= 2e-5
            assert torch.equal(tokens[row, int((~mask).sum()) :], peer.generate(alone, **options)[0])
    else:
        difference = logits[real] - peer(**padded, use_cache=False).logits[real]
        assert difference.abs().max() <= 2e-5
        assert torch.equal(tokens, peer.generate(**padded, **options, use_cache=not has_step_fault))


@torch.no_grad()
@pytest.mark.parametrize("variant", VARIANTS)
def test_float64_logits_are_those_of_transformers_in_float64(variant) -> None:
    ids = make_ids()
    with transformers_in_float64():
        peer = make_peer(variant).double()
        expected = peer(ids, use_cache=False).logits
    ours = from_transformers(peer)
    assert ours.dtype == expected.dtype == torch.float64
    assert (ours(ids).logits - expected).abs().max() <= 1e-10


@torch.no_grad()
@given(
    groups=st.integers(1, 3), repeats=st.integers(1, 3), head_dim=st.sampled_from([2, 6, 8]), layers=st.integers(1, 3),
    tied=st.booleans(), bias=st.booleans(), theta=st.sampled_from([100.0, 1e6]), seed=st.integers(0, 99),
)  # fmt: skip
def test_llamas_of_any_size_give_the_same_logits(groups, repeats, head_dim, layers, tied, bias, theta, seed) -> None:
    heads = groups * repeats
    sizes = {"hidden_size": 4 * heads, "intermediate_size": 10, "num_hidden_layers": layers, "head_dim": head_dim}
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": theta}}
    switches = {"tie_word_embeddings": tied, "attention_bias": bias, "mlp_bias": not bias}
    config = make_config("Llama", num_attention_heads=heads, num_key_value_heads=groups, **sizes, **rope, **switches)
    torch.manual_seed(seed)
    with transformers_in_float64():
        peer = LlamaForCausalLM(config).double().eval()
        expected = peer(make_ids(), use_cache=False).logits
    assert (from_transformers(peer)(make_ids()).logits - expected).abs().max() <= 1e-10


@torch.no_grad()
@pytest.mark.parametrize("variant", ["llama biases", "qwen2", "mamba2 tied, limited steps"])
@pytest.mark.parametrize("shard", ["5GB", "20KB"])
def test_folders_load_whole_and_in_shards_and_survive_saving(variant, shard, tmp_path) -> None:
    peer, ids = make_peer(variant), make_ids()
    peer.generation_config.max_new_tokens = 4
    peer.generation_config.repetition_penalty = 1.25
    peer.save_pretrained(tmp_path / "peer", max_shard_size=shard)
    assert (tmp_path / "peer" / "model.safetensors.index.json").exists() == (shard == "20KB")
    ours = from_transformers(tmp_path / "peer")
    assert torch.equal(ours(ids).logits, from_transformers(peer)(ids).logits)
    assert ours.generation_config.max_new_tokens == 4
    assert ours.generation_config.repetition_penalty == 1.25

    ours.save_pretrained(tmp_path / "ours")
    again = HybridForCausalLM.from_pretrained(tmp_path / "ours")
    assert torch.equal(again(ids).logits, ours(ids).logits)
    assert again.generation_config.repetition_penalty == 1.25
    assert torch.equal(from_transformers(tmp_path / "ours")(ids).logits, ours(ids).logits)


def test_the_new_model_shares_nothing_with_the_old_one_and_can_be_trained() -> None:
    peer = make_peer("llama tied")
    before = {name: tensor.clone() for name, tensor in peer.state_dict().items()}
    ours = from_transformers(peer)
    assert ours.lm_head.weight is ours.model.embed_tokens.weight
    assert ours.num_parameters() == peer.num_parameters()
    ours.train()(make_ids(), labels=make_ids()).loss.backward()
    assert all(parameter.grad is not None for parameter in ours.parameters())
    with torch.no_grad():
        for parameter in ours.parameters():
            parameter.zero_()
    assert all(torch.equal(tensor, before[name]) for name, tensor in peer.state_dict().items())


def test_dtype_is_kept_or_chosen(tmp_path) -> None:
    peer = make_peer("llama").to(torch.bfloat16)
    assert from_transformers(peer).dtype == torch.bfloat16
    peer.save_pretrained(tmp_path)
    assert from_transformers(tmp_path).dtype == torch.bfloat16
    wide = from_transformers(tmp_path, dtype=torch.float64)
    assert {parameter.dtype for parameter in wide.parameters()} == {torch.float64}
    assert wide.config.dtype == torch.float64
    assert torch.equal(wide.lm_head.weight, peer.lm_head.weight.double())


@torch.no_grad()
def test_the_limit_of_the_context_is_what_the_scaling_is_meant_for() -> None:
    ours = from_transformers(make_peer("llama dynamic"))
    assert ours.config.max_position_embeddings == 64
    assert from_transformers(make_peer("llama llama3")).config.max_position_embeddings == 128
    with pytest.raises(ValueError, match="65 tokens are more than max_position_embeddings=64"):
        ours(make_ids(1, 65))


def test_old_checkpoints_with_rotary_tables_and_old_names_load(tmp_path) -> None:
    from safetensors.torch import load_file, save_file

    peer = make_peer("llama")
    peer.save_pretrained(tmp_path / "llama")
    path = tmp_path / "llama" / "model.safetensors"
    tables = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file({**load_file(path), **tables}, path, {"format": "pt"})
    assert torch.equal(from_transformers(tmp_path / "llama").lm_head.weight, peer.lm_head.weight)

    peer = make_peer("mamba2")
    peer.save_pretrained(tmp_path / "mamba2")
    path = tmp_path / "mamba2" / "model.safetensors"
    tensors = load_file(path)
    tensors["backbone.embedding.weight"] = tensors.pop("backbone.embeddings.weight")
    save_file(tensors, path, {"format": "pt"})
    ours = from_transformers(tmp_path / "mamba2")
    assert torch.equal(ours.model.embed_tokens.weight, peer.backbone.embeddings.weight)

    # rope_scaling and rope_theta, as configs before transformers 5 have them
    peer = make_peer("llama linear")
    peer.save_pretrained(tmp_path / "linear")
    config = json.loads((tmp_path / "linear" / "config.json").read_text())
    del config["rope_parameters"]
    config |= {"rope_theta": 5000.0, "rope_scaling": {"type": "linear", "factor": 4.0}}
    (tmp_path / "linear" / "config.json").write_text(json.dumps(config))
    ids = make_ids()
    assert torch.equal(from_transformers(tmp_path / "linear")(ids).logits, from_transformers(peer)(ids).logits)
