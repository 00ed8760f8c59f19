"""4-bit checkpoints between this library and transformers with bitsandbytes, in both directions, bit for bit.

bitsandbytes is compared in training mode: on the CPU its evaluation mode repacks the weights in bfloat16.
"""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

import neural_layers.models.quantized  # noqa: F401  (loads folders without a model)
from neural_layers import Linear4bit
from neural_layers.errors import InputError
from neural_layers.wrappers.quantization import Plan, load_quantized, quantize, save_quantized
from tests.wrappers.quantization.samples import hybrid, inputs, llama, outputs, quantized

bitsandbytes = pytest.importorskip("bitsandbytes", reason="bitsandbytes is the judge here")
pytest.importorskip("accelerate", reason="transformers loads bitsandbytes' models with it")

FORMATS = [("nf4", False), ("nf4", True), ("fp4", False), ("fp4", True)]


def same_bits(theirs: torch.nn.Module, ours: torch.nn.Module) -> int:
    """Compare all 4-bit layers of a model of bitsandbytes with ours; how many there were."""
    count = 0
    for name, layer in theirs.named_modules():
        if isinstance(layer, bitsandbytes.nn.Linear4bit):
            own, state = ours.get_submodule(name), layer.weight.quant_state
            assert torch.equal(layer.weight.data.view(-1), own.weight.view(-1))
            assert torch.equal(state.absmax, own.absmax)
            assert (state.quant_type, state.blocksize) == (own.quant_type, own.block_size)
            if state.nested:
                assert torch.equal(state.state2.absmax, own.nested_absmax)
                assert torch.equal(state.offset, own.offset)
            count += 1
    return count


def same_logits(theirs: torch.nn.Module, ours: torch.nn.Module) -> None:
    theirs.train()
    with torch.no_grad():
        given = theirs(**inputs(theirs)).logits
    assert (given - outputs(ours)).abs().max() <= 1e-5 * outputs(ours).abs().max()


@pytest.mark.parametrize(("quant_type", "double_quant"), FORMATS)
def test_bitsandbytes_loads_our_folder(tmp_path, quant_type, double_quant) -> None:
    model = quantized(llama(tied=True), quant_type, double_quant=double_quant, embeddings=False)
    save_quantized(model, tmp_path, format="bitsandbytes")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert same_bits(theirs, model) == 7
    same_logits(theirs, model)
    # And it is still ours.
    for loaded in (load_quantized(tmp_path), load_quantized(tmp_path, llama(tied=True))):
        assert torch.equal(outputs(loaded), outputs(model))


@pytest.mark.parametrize(("quant_type", "double_quant"), FORMATS)
def test_we_load_the_folder_of_bitsandbytes(tmp_path, quant_type, double_quant) -> None:
    llama().save_pretrained(tmp_path / "plain")
    settings = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type=quant_type, bnb_4bit_use_double_quant=double_quant
    )
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "plain", quantization_config=settings)
    theirs.save_pretrained(tmp_path / "theirs")
    ours, filled = load_quantized(tmp_path / "theirs"), load_quantized(tmp_path / "theirs", llama())
    assert same_bits(theirs, ours) == 7
    same_logits(theirs, ours)
    assert torch.equal(outputs(filled), outputs(ours))
    # Their layers are those that we make of the same weights.
    own = llama()
    quantize(own, quant_type, double_quant=double_quant, include="re:.*layers.*")
    assert Plan.of(own) == Plan.of(ours)
    assert torch.equal(outputs(own), outputs(ours))


def test_our_hybrid_keeps_its_bits_in_their_format(tmp_path) -> None:
    model = quantized(hybrid(), "nf4", double_quant=True, embeddings=False)
    save_quantized(model, tmp_path, format="bitsandbytes")
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["load_in_4bit"] is True
    loaded = load_quantized(tmp_path)
    assert isinstance(loaded.model.layers[0].mixer.inner.in_proj, Linear4bit)
    assert torch.equal(outputs(loaded), outputs(model))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: quantized(llama(), "int4"), r"LinearInt4 \(int4\)|EmbeddingInt4 \(int4\), which bitsandbytes has not"),
        (lambda: quantized(llama(), "nf4"), "is a Embedding4bit .nf4., which bitsandbytes has not.*embeddings=False"),
    ],
)
def test_what_bitsandbytes_has_not_is_refused(tmp_path, make, message) -> None:
    with pytest.raises(ValueError, match=message):
        save_quantized(make(), tmp_path / "model", format="bitsandbytes")
    assert not (tmp_path / "model").exists()


def test_mixed_formats_are_refused(tmp_path) -> None:
    model = llama()
    quantize(model, "nf4", include="q_proj")
    quantize(model, "fp4", include="k_proj")
    with pytest.raises(ValueError, match="the layers are in 2 formats, and bitsandbytes has one"):
        save_quantized(model, tmp_path, format="bitsandbytes")


def test_their_folder_with_a_piece_missing_is_told(tmp_path) -> None:
    save_quantized(quantized(llama(), "nf4", embeddings=False), tmp_path, format="bitsandbytes")
    path, layer = tmp_path / "model.safetensors", "model.layers.0.mlp.up_proj.weight"
    whole = load_file(path)
    for missing, message in ((layer, "has no .* beside it"), (f"{layer}.absmax", "lacks absmax")):
        save_file({name: tensor for name, tensor in whole.items() if name != missing}, path)
        with pytest.raises(InputError, match=message):
            load_quantized(tmp_path)
