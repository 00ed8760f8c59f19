"""Quantized transformers models: through save_pretrained and from_pretrained, in training and generating."""

import json

import pytest
import torch
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForSeq2SeqLM,
    AutoModelForSequenceClassification,
    LlamaForCausalLM,
)

import neural_layers.models.quantized
from neural_layers.errors import InputError
from neural_layers.models.hybrid import HybridForCausalLM, HybridForSequenceClassification
from neural_layers.wrappers.quantization import Plan, load_quantized, quantize, save_quantized
from tests.models.hybrids import small_config
from tests.wrappers.quantization.samples import SCHEMES, cvm, hybrid, inputs, llama, outputs, quantized


def classifier():
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_labels": 3, "pad_token_id": 0}
    return HybridForSequenceClassification(small_config(["mamba2", "attention"], **sizes)).eval()


MODELS = {
    "hybrid": (hybrid, AutoModelForCausalLM),
    "cvm": (cvm, AutoModelForSeq2SeqLM),
    "llama": (llama, AutoModelForCausalLM),
    "tied llama": (lambda: llama(tied=True), AutoModelForCausalLM),
    "classifier": (classifier, AutoModelForSequenceClassification),
}


def same(loaded: nn.Module, model: nn.Module) -> None:
    """The loaded model is the other one, to the bit."""
    assert type(loaded) is type(model)
    assert not loaded.training
    assert Plan.of(loaded) == Plan.of(model)
    states = loaded.state_dict(), model.state_dict()
    assert states[0].keys() == states[1].keys()
    assert all(torch.equal(states[0][name], tensor) for name, tensor in states[1].items())
    assert torch.equal(outputs(loaded), outputs(model))


@pytest.mark.parametrize(
    ("kind", "scheme"),
    [
        *(("hybrid", scheme) for scheme in SCHEMES),
        *((kind, scheme) for kind in ("cvm", "tied llama", "classifier") for scheme in ("int8_static", "nf4")),
    ],
)
def test_from_pretrained_loads_what_save_pretrained_wrote(tmp_path, kind, scheme, recwarn) -> None:
    make, auto = MODELS[kind]
    model = quantized(make(), scheme, **({"double_quant": True} if scheme == "nf4" else {}))
    model.save_pretrained(tmp_path)
    loaded, info = auto.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    same(loaded, model)
    # A model like any other: it can be cast, and saved again.
    assert loaded.double().dtype == torch.float64
    loaded.float().save_pretrained(tmp_path / "again")
    same(load_quantized(tmp_path / "again"), model)


@pytest.mark.parametrize("kind", MODELS)
def test_a_folder_of_save_quantized_loads_everywhere(tmp_path, kind) -> None:
    make, auto = MODELS[kind]
    model = quantized(make(), "int8_static")
    save_quantized(model, tmp_path)
    for loaded in (auto.from_pretrained(tmp_path), load_quantized(tmp_path), load_quantized(tmp_path, make())):
        same(loaded, model)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["quantization_config"]["quant_method"] == "neural_layers"
    assert config["architectures"] == [type(model).__name__]


@pytest.mark.parametrize("make", [hybrid, llama])
def test_the_base_of_a_model_loads_alone_and_takes_a_head(tmp_path, make) -> None:
    model = quantized(make(), "nf4")
    model.save_pretrained(tmp_path / "whole")
    base = AutoModel.from_pretrained(tmp_path / "whole")
    ids = inputs(model)["input_ids"]
    assert torch.equal(base(ids).last_hidden_state, model.model(ids).last_hidden_state)
    base.save_pretrained(tmp_path / "base")
    headed = type(model).from_pretrained(tmp_path / "base")
    assert torch.equal(headed.model(ids).last_hidden_state, model.model(ids).last_hidden_state)


def test_a_dtype_can_be_asked_for_and_changes_no_bit(tmp_path) -> None:
    model = quantized(llama(), "nf4")
    model.save_pretrained(tmp_path)
    loaded = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert torch.equal(loaded.lm_head.absmax, model.lm_head.absmax)
    assert loaded.lm_head.absmax.dtype == torch.float32
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    same(loaded.float(), model)


@pytest.mark.parametrize("scheme", ["int8_dynamic", "nf4", "bfloat16"])
@pytest.mark.parametrize("make", [hybrid, cvm])
def test_a_quantized_model_has_a_loss_with_gradients_and_generates(make, scheme) -> None:
    model, given = quantized(make(), scheme), inputs(make())
    labels = given.get("decoder_input_ids", given["input_ids"])
    loss = model(**given, labels=labels).loss
    with torch.no_grad():
        logits = model(**given).logits
    kept, targets = (logits, labels) if make is cvm else (logits[:, :-1], labels[:, 1:])
    expected = nn.functional.cross_entropy(kept.flatten(0, 1).float(), targets.flatten())
    assert loss.item() == pytest.approx(expected.item(), rel=0.02)
    model.train()
    model(**given, labels=labels).loss.backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    # The weights are frozen; norms, biases and the recurrence are trained through them.
    assert all(grad is not None and grad.isfinite().all() for grad in grads.values())
    assert max(float(grad.abs().max()) for grad in grads.values()) > 0
    model.eval()
    made = model.generate(given["input_ids"], max_new_tokens=5, min_new_tokens=5, do_sample=False)
    assert made.shape == (2, 6 if make is cvm else 12)
    if make is hybrid:
        # Decoding token by token reads the same layers.
        with torch.no_grad():
            again = model(made[:, :-1]).logits[:, -5:].argmax(-1)
        assert (again == made[:, -5:]).float().mean() > 0.7


def test_config_knows_what_is_quantized_and_forgets_what_is_not() -> None:
    model = hybrid()
    assert not hasattr(model.config, "quantization_config")
    quantize(model, "nf4", include="lm_head", exclude=()) if not model.config.tie_word_embeddings else None
    quantize(model, "int4", include="re:.*layers.*")
    assert "lm_head" not in model.config.quantization_config["layers"]
    assert model.config.quantization_config["layers"]["model.layers.1.mixer.inner.q_proj"]["scheme"] == "int4"


def test_quantizing_while_loading_is_refused(tmp_path) -> None:
    llama().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="load the float model and call neural_layers.wrappers.quantize"):
        LlamaForCausalLM.from_pretrained(
            tmp_path, quantization_config=neural_layers.models.quantized.QuantizedConfig({"lm_head": {"scheme": "nf4"}})
        )


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["quantization_config"]["layers"].update(x={"scheme": "nf4"}), "'x' matches no module"),
        (lambda c: c["quantization_config"]["layers"]["lm_head"].update(scheme="q"), "scheme='q' must be one of"),
        (lambda c: c.update(hidden_size=32, head_dim=16), r"does not fit the model: .*\(40, 64\).*\(40, 32\)"),
        (lambda c: c.update(num_hidden_layers=2), "model.layers.1.* is missing or unknown"),
        (lambda c: c.update(architectures=["Unknown"]), "the architecture 'Unknown' in"),
        (lambda c: c.update(model_type="unknown"), "config.json cannot be used"),
    ],
)
def test_a_folder_that_does_not_fit_its_config_is_told(tmp_path, change, message) -> None:
    quantized(llama(), "nf4").save_pretrained(tmp_path)
    content = json.loads((tmp_path / "config.json").read_text())
    change(content)
    (tmp_path / "config.json").write_text(json.dumps(content))
    with pytest.raises(InputError, match=message):
        load_quantized(tmp_path)


def test_a_folder_without_config_needs_the_model(tmp_path) -> None:
    save_quantized(quantized(hybrid(), "nf4"), tmp_path)
    (tmp_path / "config.json").unlink()
    with pytest.raises(InputError, match="there is no config.json in .*; give load_quantized the float model too"):
        load_quantized(tmp_path)
    assert isinstance(load_quantized(tmp_path, hybrid()), HybridForCausalLM)


def t5():
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 1, "num_heads": 4}
    return T5ForConditionalGeneration(T5Config(**sizes, decoder_start_token_id=0)).eval()


@pytest.mark.parametrize("scheme", ["float16", "int8_dynamic", "int4", "nf4"])
def test_layers_that_transformers_keeps_in_float32_stay_where_their_dtype_is_read(tmp_path, scheme) -> None:
    model, ids = t5(), torch.arange(12).view(2, 6)
    with torch.no_grad():
        plain = model(input_ids=ids, decoder_input_ids=ids).logits
        skipped = quantize(model, scheme).skipped
        found = model(input_ids=ids, decoder_input_ids=ids).logits
    assert (found - plain).norm() < 0.5 * plain.norm()
    assert (any(name.endswith(".wo") for name in skipped)) == (scheme != "int8_dynamic")
    model.save_pretrained(tmp_path)
    base = AutoModel.from_pretrained(tmp_path)
    expected = Plan.of(model).layers
    del expected["lm_head"]
    assert Plan.of(base).layers == expected
    if scheme == "nf4":
        with pytest.raises(ValueError, match="transformers keeps it in float32"):
            quantize(t5(), Plan({"encoder.block.0.layer.1.DenseReluDense.wo": {"scheme": "nf4"}}))
