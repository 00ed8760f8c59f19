"""What cannot be converted is refused by name, with what would be right."""

import json
import shutil

import pytest
import torch

pytest.importorskip("transformers", reason="transformers is not installed")

import transformers
from safetensors.torch import load_file, save_file

from neural_layers.errors import InputError
from neural_layers.models.conversion import from_transformers
from tests.models.peers import make_config, make_peer, rope

_LONG = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 16, "factor": 4.0}


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Folders of a whole and of a sharded Llama model."""
    folder = tmp_path_factory.mktemp("saved")
    make_peer("llama").save_pretrained(folder / "whole")
    make_peer("llama").save_pretrained(folder / "shards", max_shard_size="20KB")
    return folder


@pytest.fixture
def folders(saved, tmp_path):
    """Copies of them, to be broken."""
    shutil.copytree(saved, tmp_path, dirs_exist_ok=True)
    return tmp_path


@pytest.mark.parametrize(
    ("family", "changes", "message"),
    [
        ("Llama", {"hidden_act": "gelu"}, "llama: hidden_act='gelu' is not supported, only 'silu' or 'swish'"),
        ("Mamba", {"hidden_act": "relu"}, "mamba: hidden_act='relu' is not supported"),
        (
            "Llama",
            rope("longrope", **_LONG),
            "rope_type='longrope', which is not supported, only default, linear, dynamic, yarn, llama3",
        ),
        ("Llama", rope("default", partial_rotary_factor=0.5), "partial_rotary_factor=0.5, which is not supported"),
        (
            "Qwen2",
            rope("yarn", factor=4.0, original_max_position_embeddings=16, truncate=False),
            "qwen2: rope_parameters has truncate=False, which is not supported, only True",
        ),
        (
            "Qwen3",
            {"layer_types": ["full_attention", "chunked_attention", "full_attention"]},
            "qwen3: layer_types holds 'chunked_attention', which is not supported, only full_attention, sliding_atte",
        ),
    ],
)
def test_what_a_config_asks_for_and_is_lacking_is_named(family, changes, message) -> None:
    model = getattr(transformers, f"{family}ForCausalLM")(make_config(family, **changes))
    with pytest.raises(InputError, match=message):
        from_transformers(model)


def test_a_wide_residual_stream_is_refused_in_half_precision_only() -> None:
    peer = make_peer("mamba").to(torch.bfloat16)
    with pytest.raises(
        InputError, match="residual_in_fp32=True is not supported, only False in torch.bfloat16; load it"
    ):
        from_transformers(peer)
    assert from_transformers(peer, dtype=torch.float32).dtype == torch.float32


def test_unknown_architectures_and_objects_are_refused(tmp_path) -> None:
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(n_layer=1, n_embd=8, n_head=2, vocab_size=20))
    known = "known are llama, mistral, qwen2, qwen3, mamba, mamba2, neural_hybrid"
    with pytest.raises(InputError, match=f"model_type='gpt2' is not supported; {known}"):
        from_transformers(gpt2)
    gpt2.save_pretrained(tmp_path)
    with pytest.raises(InputError, match=f"model_type='gpt2' is not supported; {known}"):
        from_transformers(tmp_path)
    with pytest.raises(InputError, match="takes a model of transformers or a folder, not Linear"):
        from_transformers(torch.nn.Linear(1, 1))


def test_quantized_and_empty_models_are_refused() -> None:
    peer = make_peer("llama")
    peer.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(InputError, match="quantization_config is set.*dequantize the model first"):
        from_transformers(peer)
    with torch.device("meta"):
        empty = transformers.LlamaForCausalLM(make_config("Llama"))
    with pytest.raises(InputError, match="LlamaForCausalLM lies on the meta device"):
        from_transformers(empty)


def test_models_with_another_head_are_refused() -> None:
    config = make_config("Llama", num_labels=2)
    with pytest.raises(InputError, match=r"LlamaForSequenceClassification lacks lm_head.weight"):
        from_transformers(transformers.LlamaForSequenceClassification(config))
    tied = make_config("Llama", num_labels=2, tie_word_embeddings=True)
    with pytest.raises(InputError, match=r"holds what its config has no place for: score.weight"):
        from_transformers(transformers.LlamaForSequenceClassification(tied))


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"), "lacks model.layers.1.mlp.up_proj.weight$"),
        (lambda tensors: tensors.update(extra=torch.ones(1)), "holds what its config has no place for: extra$"),
        (
            lambda tensors: tensors.update({"model.norm.weight": torch.ones(3)}),
            r"model.norm.weight has shape \(3,\); its config says \(32,\)",
        ),
    ],
)
def test_every_tensor_is_accounted_for(edit, message, folders) -> None:
    path = folders / "whole" / "model.safetensors"
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, {"format": "pt"})
    with pytest.raises(InputError, match=message):
        from_transformers(folders / "whole")


def test_a_head_that_differs_from_tied_embeddings_is_refused(folders) -> None:
    path = folders / "whole" / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "tie_word_embeddings": True}))
    with pytest.raises(InputError, match="lm_head.weight differs from the embeddings.*tie_word_embeddings=True"):
        from_transformers(folders / "whole")


def test_folders_that_cannot_be_read_say_why(folders) -> None:
    whole, shards = folders / "whole", folders / "shards"
    with pytest.raises(InputError, match="nowhere is no folder"):
        from_transformers(folders / "nowhere")
    with pytest.raises(InputError, match=r"holds no config.json"):
        from_transformers(folders)

    weights = whole / "model.safetensors"
    content = weights.read_bytes()
    weights.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=r"model.safetensors cannot be read"):
        from_transformers(whole)
    weights.unlink()
    with pytest.raises(InputError, match=r"holds no model.safetensors and no model.safetensors.index.json"):
        from_transformers(whole)
    (whole / "pytorch_model.bin").write_bytes(b"anything")
    with pytest.raises(InputError, match=r"pytorch_model.bin, which could run any code.*writes safetensors"):
        from_transformers(whole)
    (whole / "config.json").write_text("{")
    with pytest.raises(InputError, match=r"config.json cannot be read"):
        from_transformers(whole)
    (whole / "config.json").write_text(json.dumps({"model_type": "llama", "num_attention_heads": 5}))
    with pytest.raises(InputError, match=r"config.json: .*"):
        from_transformers(whole)

    index = shards / "model.safetensors.index.json"
    places = json.loads(index.read_text())
    name, file = next(iter(places["weight_map"].items()))
    index.write_text(json.dumps({**places, "weight_map": {**places["weight_map"], name: f"../{file}"}}))
    with pytest.raises(InputError, match=r"which is not there"):
        from_transformers(shards)
    index.write_text(json.dumps({**places, "weight_map": {**places["weight_map"], "new": file}}))
    with pytest.raises(InputError, match=r"holds no new, which model.safetensors.index.json places there"):
        from_transformers(shards)
    index.write_text("{}")
    with pytest.raises(InputError, match=r"has no weight_map"):
        from_transformers(shards)
