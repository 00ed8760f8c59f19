"""Adapters that go between PEFT and here, in both directions, with PEFT's logits as the judge."""

import dataclasses
import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from neural_layers.wrappers.lora import (
    LoRAConfig,
    LoRALinear,
    apply_lora,
    load_adapter,
    merge_lora,
    save_adapter,
    unmerge_lora,
)
from tests.wrappers.lora.samples import everywhere, hybrid, shake, tokens, trained

peft = pytest.importorskip("peft", reason="PEFT judges the files and is not installed")

LLAMA = ("q_proj", "v_proj")
CASES = {
    "plain": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "patterns": {"rank_pattern": {"v_proj": 2}, "alpha_pattern": {"layers.1.self_attn.q_proj": 5}},
    "all-linear": {"target_modules": "all-linear"},
    "embeddings": {"target_modules": ("q_proj", "embed_tokens"), "use_rslora": True},
    "dora embeddings": {"target_modules": ("embed_tokens", "up_proj"), "use_dora": True},
    "layers": {"layers": (1,)},
}


def llama():
    transformers = pytest.importorskip("transformers", reason="the judge's model")
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=23, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, tie_word_embeddings=False,
    )  # fmt: skip
    return transformers.LlamaForCausalLM(config).eval()


MODELS = {"llama": llama, "hybrid": lambda: hybrid(dtype=torch.float32)}


def peft_model(base, fields):
    """The same config in PEFT's words, with an adapter that is no longer at its beginning."""
    fields = {"target_modules": LLAMA, **fields}
    targets, layers = fields.pop("target_modules"), fields.pop("layers", None)
    config = peft.LoraConfig(
        r=3, lora_alpha=6, target_modules=targets if isinstance(targets, str) else list(targets),
        layers_to_transform=None if layers is None else list(layers), **fields,
    )  # fmt: skip
    torch.manual_seed(1)
    model = peft.get_peft_model(base, config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("case", CASES)
def test_an_adapter_of_peft_gives_the_same_logits_here(case, tmp_path) -> None:
    theirs, ids = peft_model(llama(), CASES[case]), tokens()
    expected = theirs(ids).logits
    theirs.save_pretrained(tmp_path)
    ours = llama()
    before = ours(ids).logits
    report = load_adapter(ours, tmp_path)
    assert (expected - before).abs().max() > 1e-3
    torch.testing.assert_close(ours(ids).logits, expected, rtol=1e-5, atol=1e-5)
    assert report.trainable == 0
    merge_lora(ours)
    torch.testing.assert_close(ours(ids).logits, expected, rtol=1e-5, atol=1e-5)
    unmerge_lora(ours)
    # And back: what we save of it is what PEFT had.
    again = tmp_path / "again"
    save_adapter(ours, again)
    own, original = load_file(again / "adapter_model.safetensors"), load_file(tmp_path / "adapter_model.safetensors")
    assert own.keys() == {key for key in original if "base_layer" not in key}
    assert all(torch.equal(own[key], original[key]) for key in own)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("case", CASES)
def test_an_adapter_of_ours_gives_the_same_logits_in_peft(case, model, tmp_path) -> None:
    if model == "hybrid" and case in ("patterns", "layers"):
        pytest.skip("the names in this case are Llama's")
    ours, ids = MODELS[model](), tokens()
    fields = {"target_modules": LLAMA, **CASES[case]}
    trained(ours, LoRAConfig(r=3, alpha=6, **fields), "mine")
    expected = ours(ids).logits
    save_adapter(ours, tmp_path, "mine")
    theirs = peft.PeftModel.from_pretrained(MODELS[model](), tmp_path).eval()
    torch.testing.assert_close(theirs(ids).logits, expected, rtol=1e-5, atol=1e-5)
    kinds = [m for m in theirs.modules() if isinstance(m, peft.tuners.lora.LoraLayer)]
    assert len(kinds) == sum(".base_layer" in name for name, _ in ours.named_modules())


def test_saving_and_loading_keep_every_bit_convolutions_included(tmp_path) -> None:
    first, second, ids = hybrid(), hybrid(), tokens()
    trained(first, everywhere(use_dora=True, rank_pattern={"x_proj": 2}))
    save_adapter(first, tmp_path)
    load_adapter(second, tmp_path, "other", trainable=True)
    assert torch.equal(first(ids).logits, second(ids).logits)
    assert {n.replace(".default.", ".other.") for n, p in first.named_parameters() if p.requires_grad} == {
        n for n, p in second.named_parameters() if p.requires_grad
    }


def test_a_merged_model_saves_its_adapter_as_it_is(tmp_path) -> None:
    first, second, ids = hybrid(), hybrid(), tokens()
    trained(first, LoRAConfig(r=3))
    expected = first(ids).logits
    merge_lora(first)
    save_adapter(first, tmp_path)
    load_adapter(second, tmp_path)
    torch.testing.assert_close(second(ids).logits, expected)


def test_dtypes_follow_the_layers(tmp_path) -> None:
    saved = hybrid(dtype=torch.float32)
    trained(saved, LoRAConfig(r=2))
    save_adapter(saved.half(), tmp_path)
    for dtype, expected in ((torch.float64, torch.float64), (torch.bfloat16, torch.float32)):
        model = hybrid(dtype=dtype)
        load_adapter(model, tmp_path)
        assert {p.dtype for n, p in model.named_parameters() if ".adapters." in n} == {expected}
        assert model(tokens()).logits.dtype == dtype


@pytest.mark.filterwarnings("ignore")
def test_weights_of_the_base_beside_an_adapter_must_be_those_of_the_model(tmp_path) -> None:
    peft_model(llama(), {"target_modules": ("embed_tokens",)}).save_pretrained(tmp_path)
    assert any("base_layer" in key for key in load_file(tmp_path / "adapter_model.safetensors"))
    model = llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[0, 0] += 1
    with pytest.raises(ValueError, match="another base: .*embed_tokens.base_layer.weight has other numbers"):
        load_adapter(model, tmp_path)
    assert unchanged(model)


@pytest.mark.filterwarnings("ignore")
def test_weights_of_the_base_beside_an_adapter_may_be_rounded(tmp_path) -> None:
    peft_model(llama().to(torch.bfloat16), {"target_modules": ("embed_tokens",)}).save_pretrained(tmp_path)
    load_adapter(llama(), tmp_path)
    load_adapter(llama().to(torch.bfloat16), tmp_path)


def test_every_field_of_an_adapters_config_is_known_here() -> None:
    from neural_layers.wrappers.lora.peft_config import _OTHERS, _PLAIN

    assert {field.name for field in dataclasses.fields(peft.LoraConfig)} <= _OTHERS | _PLAIN.keys()


@pytest.mark.filterwarnings("ignore")
def test_the_folder_above_an_adapter_with_a_name_tells_where_it_is(tmp_path) -> None:
    peft.get_peft_model(llama(), peft.LoraConfig(target_modules=["q_proj"]), "mine").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"holds no adapter_model.safetensors: .*mine does"):
        load_adapter(llama(), tmp_path)


def unchanged(model):
    return not any(isinstance(m, LoRALinear) for m in model.modules()) and all(
        p.requires_grad for p in model.parameters()
    )


@pytest.mark.parametrize(
    ("base", "message"),
    [
        ({"hidden_size": 32}, r"another base: .*layers.2.mixer.inner.k_proj.lora_A.weight has shape \(8, 16\), and "
         r"model.layers.2.mixer.inner.k_proj \(Linear\) with r=8 takes \(8, 32\)"),
        ({"mixers": ["mamba", "attention", "mamba2"]}, r"another base: .*'model.layers.2.mixer.inner.k_proj', which "
         "HybridForCausalLM has not; the nearest are model.layers.1.mixer.inner.k_proj"),
    ],
)  # fmt: skip
def test_an_adapter_of_another_base_is_refused_by_the_first_key_that_does_not_fit(base, message, tmp_path) -> None:
    model = hybrid()
    apply_lora(model, LoRAConfig(r=8, target_modules=("q_proj", "k_proj")))
    save_adapter(model, tmp_path)
    other = hybrid(**base)
    with pytest.raises(ValueError, match=message):
        load_adapter(other, tmp_path)
    assert unchanged(other)


def spoil(folder, case):
    weights, config = folder / "adapter_model.safetensors", folder / "adapter_config.json"
    content, tensors = json.loads(config.read_text()), load_file(weights)
    if case == "missing":
        weights.unlink()
    elif case == "pickled":
        weights.rename(folder / "adapter_model.bin")
    elif case == "truncated":
        weights.write_bytes(weights.read_bytes()[:-9])
    elif case == "half":
        save_file({key: t for key, t in tensors.items() if "lora_B" not in key}, weights)
    elif case == "foreign":
        save_file({**tensors, "base_model.model.lm_head.weight": torch.zeros(2)}, weights)
    else:
        config.write_text(json.dumps({**content, **json.loads(case)}))


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("missing", "holds no adapter_model.safetensors"),
        ("pickled", "adapter_model.bin is pickled, and nothing is unpickled"),
        ("truncated", "cannot be read"),
        ("half", "has no lora_B for model.layers.2.mixer.inner.q_proj"),
        ("foreign", "holds base_model.model.lm_head.weight, which is no tensor of a LoRA adapter"),
        ('{"r": 5}', r"has shape \(2, 16\), and .* with r=5 takes \(5, 16\)"),
        ('{"r": "5"}', "gives .* r='5'"),
        ('{"use_dora": true}', "has no magnitude for"),
        ('{"bias": "all"}', "bias='all', which is not supported"),
        ('{"init_lora_weights": "pissa"}', "init_lora_weights='pissa'"),
        ('{"peft_type": "IA3"}', "peft_type='IA3'; expected 'LORA'"),
        ('{"of_tomorrow": {"x": 1}}', "of_tomorrow={'x': 1}, which is not known here"),
        ('{"r": true}', "gives .* r=True"),
        ('{"lora_alpha": NaN}', "lora_alpha=nan; expected numbers"),
        ('{"lora_dropout": 1.5}', r"lora_dropout=1.5; expected a number in \[0, 1\)"),
        ('{"lora_dropout": "a"}', "lora_dropout='a'"),
        ('{"rank_pattern": ["q_proj"]}', r"rank_pattern=\['q_proj'\]; expected names with numbers"),
        ('{"rank_pattern": {"(": 3}}', "with no regular expression: missing"),
    ],
)
def test_files_that_cannot_be_are_refused_and_the_model_stays(case, message, tmp_path) -> None:
    saved, model = hybrid(), hybrid()
    apply_lora(saved, LoRAConfig(r=2))
    save_adapter(saved, tmp_path)
    spoil(tmp_path, case)
    with pytest.raises(ValueError, match=message):
        load_adapter(model, tmp_path)
    assert unchanged(model)


def test_a_save_that_fails_leaves_the_adapter_that_was_there(tmp_path, monkeypatch) -> None:
    model = hybrid()
    trained(model, LoRAConfig(r=2))
    save_adapter(model, tmp_path)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    shake(model, "default", seed=5)
    monkeypatch.setattr("os.replace", lambda *paths: (_ for _ in ()).throw(OSError(28, "No space left on device")))
    with pytest.raises(OSError, match="No space left"):
        save_adapter(model, tmp_path)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_adapters_that_one_file_cannot_hold_are_refused(tmp_path) -> None:
    model = nn.ModuleDict({"a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
    for part, dropout in (("a", 0.0), ("b", 0.5)):
        holder = nn.ModuleDict({part: model[part]})
        apply_lora(holder, LoRAConfig(r=1, target_modules=(part,), dropout=dropout))
        model[part] = holder[part]
    with pytest.raises(ValueError, match="differ in dropout"):
        save_adapter(model, tmp_path)
