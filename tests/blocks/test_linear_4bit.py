"""Linear4bit: its bits under every move, its state dict and bitsandbytes' own."""

import copy

import pytest
import torch
from safetensors.torch import load_file, save_file

import neural_layers.functional as F
from neural_layers import Linear4bit

FORMATS = [("nf4", False), ("nf4", True), ("fp4", False), ("fp4", True)]
BITS = ("weight", "absmax", "offset", "nested_absmax")


def plain(in_features: int = 128, out_features: int = 64, *, bias: bool = True) -> torch.nn.Linear:
    torch.manual_seed(0)
    return torch.nn.Linear(in_features, out_features, bias=bias)


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize(("quant_type", "double_quant"), FORMATS)
def test_a_layer_is_the_op_over_the_quantized_weight(quant_type, double_quant) -> None:
    linear, x = plain(), randn(2, 5, 128).requires_grad_()
    layer = Linear4bit.from_linear(linear, quant_type, 32, double_quant)
    quantized = F.quantize_4bit(linear.weight, quant_type, 32, double_quant)
    assert torch.equal(layer(x), F.linear_4bit(x, quantized, linear.bias))
    assert [name for name, _ in layer.named_parameters()] == ["bias"]
    layer(x).sum().backward()
    assert torch.equal(layer.bias.grad, torch.full((64,), 10.0))
    assert x.grad.abs().max() > 0
    assert layer.bias is not linear.bias


def test_a_layer_without_bias_and_of_odd_width_works() -> None:
    layer = Linear4bit.from_linear(plain(33, 7, bias=False))
    assert layer.bias is None
    assert layer(randn(33)).shape == (7,)
    assert list(layer.state_dict()) == ["weight"] + [
        f"weight.{n}" for n in ("absmax", "quant_map", "quant_state.bitsandbytes__nf4")
    ]


@pytest.mark.parametrize(("quant_type", "double_quant"), FORMATS)
@pytest.mark.parametrize(
    "move",
    [
        lambda m: m.to(torch.bfloat16),
        lambda m: m.half().double().float(),
        lambda m: m.type(torch.float16),
        lambda m: copy.deepcopy(m),
        lambda m: torch.nn.Sequential(m).to("cpu", torch.float64)[0],
        lambda m: m.eval().requires_grad_(False),
    ],
)
def test_no_move_changes_a_bit(quant_type, double_quant, move) -> None:
    layer = Linear4bit.from_linear(plain(), quant_type, 64, double_quant)
    before, record = {name: copy.deepcopy(getattr(layer, name)) for name in BITS}, layer.quantized
    moved = move(layer)
    for name, bits in before.items():
        after = getattr(moved, name)
        assert (after is None) == (bits is None)
        assert bits is None or (after.dtype == bits.dtype and torch.equal(after, bits)), name
    assert moved.quantized.dtype == record.dtype
    x = randn(3, 128).to(moved.bias.dtype)
    assert torch.equal(moved(x), F.linear_4bit(x, record, moved.bias))


@pytest.mark.parametrize(("quant_type", "double_quant"), FORMATS)
def test_saved_and_loaded_it_gives_the_same_output(quant_type, double_quant, tmp_path) -> None:
    layer, x = Linear4bit.from_linear(plain(), quant_type, 64, double_quant), randn(3, 128)
    save_file(layer.state_dict(), tmp_path / "layer.safetensors")
    state = load_file(tmp_path / "layer.safetensors")
    for device, assign in (("cpu", False), ("cpu", True), ("meta", True)):
        with torch.device(device):
            other = Linear4bit(128, 64, quant_type=quant_type, double_quant=double_quant)
        assert set(other.state_dict()) == set(state)
        other.load_state_dict(state, assign=assign)
        assert torch.equal(other(x), layer(x)), (device, assign)
        assert {tensor.device.type for tensor in other.state_dict().values()} == {"cpu"}


@pytest.mark.parametrize(("quant_type", "double_quant"), FORMATS)
def test_state_dict_is_that_of_bitsandbytes_in_both_directions(quant_type, double_quant, tmp_path) -> None:
    bnb = pytest.importorskip("bitsandbytes", reason="the peer whose format this is")
    linear, x = plain(), randn(3, 128)
    options = {"quant_type": quant_type, "compress_statistics": double_quant}
    theirs = bnb.nn.Linear4bit(128, 64, **options)
    theirs.load_state_dict(linear.state_dict())
    # In training mode, because its first forward in evaluation repacks the weight.
    theirs = theirs.to("cpu").train()
    ours = Linear4bit.from_linear(linear, quant_type, 64, double_quant)

    save_file(theirs.state_dict(), tmp_path / "theirs.safetensors")
    save_file(ours.state_dict(), tmp_path / "ours.safetensors")
    from_them, from_us = load_file(tmp_path / "theirs.safetensors"), load_file(tmp_path / "ours.safetensors")
    assert set(from_them) == set(from_us)
    for key, tensor in from_them.items():
        assert (tensor.dtype, tensor.shape) == (from_us[key].dtype, from_us[key].shape), key
        assert torch.equal(tensor, from_us[key]), key

    loaded = Linear4bit(128, 64, quant_type=quant_type, double_quant=double_quant)
    loaded.load_state_dict(from_them)
    assert torch.equal(loaded(x), ours(x))
    again = bnb.nn.Linear4bit(128, 64, **options)
    statistics = {key: value for key, value in from_us.items() if key.startswith("weight.")}
    again.weight = bnb.nn.Params4bit.from_prequantized(from_us["weight"], statistics, device="cpu", module=again)
    again.bias.data = from_us["bias"]
    assert torch.equal(again.train()(x), theirs(x))
    torch.testing.assert_close(ours(x), theirs(x), rtol=0, atol=2e-6)


def test_a_weight_that_bitsandbytes_stored_in_wider_elements_is_the_same_weight() -> None:
    layer = Linear4bit.from_linear(plain())
    state = layer.state_dict()
    state["weight"] = state["weight"].view(-1).view(torch.bfloat16)[:, None]
    other = Linear4bit(128, 64)
    other.load_state_dict(state)
    assert torch.equal(other(randn(2, 128)), layer(randn(2, 128)))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"quant_type": "fp4"}, "quant_type='nf4'.*built for.*quant_type='fp4'"),
        ({"block_size": 128}, "block_size=64.*built for.*block_size=128"),
        ({"double_quant": True}, "double_quant=False.*built for.*double_quant=True"),
        ({"in_features": 64}, r"\(64, 128\).*built for \(64, 64\)"),
        ({"out_features": 32}, r"\(64, 128\).*built for \(32, 128\)"),
    ],
)
def test_a_weight_of_another_format_is_refused_with_both_formats(options, message) -> None:
    state = Linear4bit.from_linear(plain()).state_dict()
    layer = Linear4bit(**{"in_features": 128, "out_features": 64} | options)
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(state)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: plain().state_dict(), "not quantized.*Linear4bit.from_linear"),
        (lambda state: without(state, "weight.absmax"), "lacks absmax"),
        (lambda state: without(state, "weight"), r'Missing key.*"weight"'),
        (lambda state: without(state, "weight.quant_state.bitsandbytes__nf4"), "expected one quant_state"),
        (lambda state: state | {"weight.quant_map": torch.ones(16)}, "quant_map holds other values"),
        (lambda state: state | {"weight.absmax": torch.ones(3)}, r"absmax has shape \(3,\)"),
        (
            lambda state: state | {"weight.quant_state.bitsandbytes__nf4": torch.zeros(4, dtype=torch.uint8)},
            "not the JSON text of a 4-bit weight",
        ),
        (lambda state: {f"0.{key}": value for key, value in state.items()}, "Unexpected key"),
    ],
)
def test_a_damaged_state_dict_is_refused_by_name_and_leaves_the_layer_as_it_was(change, message) -> None:
    layer = Linear4bit.from_linear(plain())
    before = copy.deepcopy(layer.quantized)
    with pytest.raises(RuntimeError, match=message):
        layer.load_state_dict(change(dict(layer.state_dict())))
    assert torch.equal(layer.weight, before.packed)
    assert torch.equal(layer.absmax, before.absmax)


def without(state: dict, key: str) -> dict:
    return {name: value for name, value in state.items() if name != key}


def test_a_state_dict_without_the_weight_may_be_loaded_unless_strict() -> None:
    layer = Linear4bit.from_linear(plain())
    before = layer.weight.clone()
    missing = layer.load_state_dict({"bias": torch.zeros(64)}, strict=False).missing_keys
    assert "weight" in missing
    assert torch.equal(layer.weight, before)
    assert not layer.bias.any()


def test_a_layer_inside_a_model_is_saved_and_loaded_under_its_prefix() -> None:
    model = torch.nn.Sequential(torch.nn.ReLU(), Linear4bit.from_linear(plain(), double_quant=True))
    other = torch.nn.Sequential(torch.nn.ReLU(), Linear4bit(128, 64, double_quant=True))
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(randn(2, 128)), model(randn(2, 128)))


def test_quantized_can_be_replaced_by_a_weight_of_its_shape_alone() -> None:
    layer, weight = Linear4bit(128, 64), plain().weight
    layer.quantized = F.quantize_4bit(weight, "fp4", 128, True)
    assert torch.equal(layer(randn(2, 128)), F.linear_4bit(randn(2, 128), layer.quantized, layer.bias))
    assert "quant_type='fp4', block_size=128, double_quant=True" in repr(layer)
    with pytest.raises(ValueError, match=r"shape \(128, 64\); expected \(out, in\) = \(64, 128\)"):
        layer.quantized = F.quantize_4bit(weight.T)


def test_no_dequantized_copy_is_kept() -> None:
    layer = Linear4bit.from_linear(plain(256, 256, bias=False))
    layer(randn(2, 256)), layer.eval()(randn(2, 256))
    held = [t for t in (*layer.buffers(), *layer.parameters(), *vars(layer).values()) if isinstance(t, torch.Tensor)]
    assert sum(t.numel() * t.element_size() for t in held) == 256 * 256 // 2 + 4 * 256 * 256 // 64


def test_a_layer_is_compiled_and_exported() -> None:
    layer, x = Linear4bit.from_linear(plain(), double_quant=True), randn(3, 128)
    assert torch.equal(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), layer(x))
    exported = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("rows")},)).module()
    for rows in (3, 40):
        torch.testing.assert_close(exported(randn(rows, 128)), layer(randn(rows, 128)))


def test_from_linear_refuses_what_is_not_linear() -> None:
    with pytest.raises(TypeError, match="linear is a Conv1d; expected an nn.Linear"):
        Linear4bit.from_linear(torch.nn.Conv1d(2, 2, 1))
