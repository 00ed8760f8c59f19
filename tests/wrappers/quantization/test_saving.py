"""Quantized models of any kind as folders: the same bits, and folders that are not what they should be."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from neural_layers.errors import InputError
from neural_layers.wrappers.quantization import Plan, load_quantized, quantize, save_quantized
from tests.wrappers.quantization.samples import SCHEMES, Tower, outputs, quantized, tower


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_users_model_loads_to_the_same_bits(tmp_path, scheme) -> None:
    model = quantized(tower(), scheme)
    folder = save_quantized(model, tmp_path / "model")
    assert sorted(path.name for path in folder.iterdir()) == ["model.safetensors", "quantization.json"]
    fresh = tower(seed=1)
    modules = {"embed", "head", "first.0"}
    loaded = load_quantized(folder, fresh)
    assert loaded is fresh
    assert torch.equal(outputs(loaded), outputs(model))
    assert Plan.of(loaded) == Plan.of(model)
    assert loaded.again is loaded.first
    assert loaded.head.weight is loaded.embed.weight
    assert all(type(loaded.get_submodule(n)) is type(model.get_submodule(n)) for n in modules)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor), name
    # A weight is in the file once.
    names = list(load_file(folder / "model.safetensors"))
    assert not [name for name in names if name.startswith(("again.", "head.weight"))]


def test_what_stays_plain_and_tied_is_written_once(tmp_path) -> None:
    model = quantized(tower(), "nf4", exclude="head", double_quant=True)
    save_quantized(model, tmp_path / "model")
    names = load_file(tmp_path / "model" / "model.safetensors")
    assert "embed.weight" in names
    assert "head.weight" not in names
    loaded = load_quantized(tmp_path / "model", tower(seed=1))
    assert loaded.head.weight is loaded.embed.weight
    assert torch.equal(outputs(loaded), outputs(model))


def test_plain_parameters_come_in_the_dtype_of_the_file(tmp_path) -> None:
    model = quantized(tower(), "int4").to(torch.bfloat16)
    save_quantized(model, tmp_path / "model")
    loaded = load_quantized(tmp_path / "model", tower(seed=1).train())
    assert loaded.training
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert outputs(loaded.eval()).dtype == torch.bfloat16
    assert torch.equal(outputs(loaded), outputs(model))


def test_saving_again_replaces_and_an_interrupted_save_does_not(tmp_path, monkeypatch) -> None:
    folder = save_quantized(quantized(tower(), "nf4"), tmp_path / "model")
    save_quantized(quantized(tower(), "int8_dynamic"), folder)
    (folder / "tokenizer.json").write_text("{}")
    expected = outputs(load_quantized(folder, tower(seed=1)))

    def fail(*args, **kwargs):
        raise OSError("no space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", fail)
    with pytest.raises(OSError, match="no space"):
        save_quantized(quantized(tower(), "fp4"), folder)
    assert sorted(p.name for p in folder.iterdir()) == ["model.safetensors", "quantization.json", "tokenizer.json"]
    assert torch.equal(outputs(load_quantized(folder, tower(seed=1))), expected)


@pytest.mark.parametrize(
    ("model", "arguments", "message"),
    [
        (lambda: tower(), {}, "no layer of the model is quantized; call quantize"),
        (lambda: quantized(tower(), "int8_qat"), {}, "'embed' is prepared for int8_qat; call convert_qat"),
        (lambda: quantized(tower(), "nf4"), {"format": "gguf"}, "format='gguf' must be one of 'neural_layers'"),
        (lambda: quantized(tower(), "nf4"), {"format": "bitsandbytes"}, "a Tower is no transformers model"),
    ],
)
def test_what_cannot_be_saved_is_refused_and_writes_nothing(tmp_path, model, arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        save_quantized(model(), tmp_path / "model", **arguments)
    assert not (tmp_path / "model").exists()


def cut(folder) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def drop(*names):
    def change(folder) -> None:
        path = folder / "model.safetensors"
        save_file({name: t for name, t in load_file(path).items() if name not in names}, path)

    return change


def add(folder) -> None:
    path = folder / "model.safetensors"
    save_file(load_file(path) | {"extra.weight": torch.ones(2)}, path)


def plan(change):
    def write(folder) -> None:
        content = json.loads((folder / "quantization.json").read_text())
        change(content)
        (folder / "quantization.json").write_text(json.dumps(content))

    return write


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (cut, "model.safetensors cannot be read .* cut off"),
        (drop("conv.weight"), "conv.weight is missing in"),
        (drop("first.0.scale"), "'first.0' does not fit the model: .*scale"),
        (drop("first.0.weight"), "'first.0' does not fit the model: .*weight"),
        (add, "extra.weight in .* is not known to the model"),
        (lambda f: (f / "model.safetensors").unlink(), "there is no model.safetensors in"),
        (lambda f: (f / "quantization.json").unlink(), "holds no quantized model .no quantization.json"),
        (lambda f: (f / "quantization.json").write_text("{"), "quantization.json cannot be read"),
        (lambda f: (f / "quantization.json").write_text("{}"), "the plan in .* cannot be used: KeyError"),
        (plan(lambda c: c["layers"].update(other={"scheme": "nf4"})), "'other' matches no module.*of another model"),
        (
            plan(lambda c: c["layers"].update(conv={"scheme": "nf4"})),
            "'conv' cannot be put into this model: it is a Conv1d",
        ),
        (plan(lambda c: c["layers"]["first.0"].update(scheme="int4")), "'first.0' does not fit the model"),
        (plan(lambda c: c["layers"]["first.0"].update(scheme="int5")), "scheme='int5' must be one of"),
        (shutil.rmtree, "there is no folder"),
    ],
)
def test_a_damaged_folder_is_told_and_the_model_unchanged(tmp_path, damage, message) -> None:
    folder = save_quantized(quantized(tower(), "int8_dynamic"), tmp_path / "model")
    damage(folder)
    model = tower(seed=1)
    before, modules = outputs(model), dict(model.named_modules())
    with pytest.raises(InputError, match=message):
        load_quantized(folder, model)
    assert dict(model.named_modules()) == modules
    assert torch.equal(outputs(model), before)


def test_a_folder_of_another_model_is_told(tmp_path) -> None:
    folder = save_quantized(quantized(tower(), "nf4"), tmp_path / "model")
    with pytest.raises(InputError, match=r"'embed' does not fit the model: .*\(40, 64\).*\(40, 48\)"):
        load_quantized(folder, tower(width=48))
    with pytest.raises(InputError, match="'embed' matches no module"):
        load_quantized(folder, nn.Sequential(nn.Linear(64, 96)))
    model = Tower()
    model.conv = nn.Conv1d(64, 64, 5)
    with pytest.raises(InputError, match=r"conv.weight in .* has shape \(64, 64, 3\); expected \(64, 64, 5\)"):
        load_quantized(folder, model)
    quantize(model, "nf4")
    with pytest.raises(InputError, match="cannot be put into this model: it is a Embedding4bit|an Embedding4bit"):
        load_quantized(folder, model)
