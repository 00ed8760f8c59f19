"""LinearInt8, LinearInt4 and the quantized embeddings: bits under every move, sharing, state dicts, quick calls."""

import copy
import pickle

import pytest
import torch
from torch import nn

import neural_layers
import neural_layers.functional as F
from neural_layers import Embedding4bit, EmbeddingInt4, EmbeddingInt8, Linear4bit, LinearInt4, LinearInt8

LINEARS = {"int8": LinearInt8, "int4": LinearInt4, "nf4": Linear4bit}
TABLES = {"int8": EmbeddingInt8, "int4": EmbeddingInt4, "nf4": Embedding4bit}
# Relative root mean square error of a normal weight.
ERRORS = {"int8": 0.01, "int4": 0.1, "nf4": 0.1}
KINDS = pytest.mark.parametrize("kind", LINEARS)


def plain(in_features: int = 96, out_features: int = 40, *, bias: bool = True) -> nn.Linear:
    torch.manual_seed(0)
    return nn.Linear(in_features, out_features, bias=bias)


def table(rows: int = 50, width: int = 96, padding_idx: int | None = None) -> nn.Embedding:
    torch.manual_seed(1)
    return nn.Embedding(rows, width, padding_idx=padding_idx)


def randn(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def op(layer: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What the layer computes, by the op and its questions."""
    if isinstance(layer, LinearInt8):
        scales = {"input_scale": layer.input_scale, "input_zero_point": layer.input_zero_point}
        return F.linear_int8(x, layer.weight, layer.scale, layer.bias, **scales)
    call = F.linear_int4 if isinstance(layer, LinearInt4) else F.linear_4bit
    return call(x, layer.quantized, layer.bias)


def bits_of(module: nn.Module) -> list[torch.Tensor]:
    return [module._buffers[name] for name in module.bits if module._buffers[name] is not None]


@KINDS
@pytest.mark.parametrize("bias", [True, False])
def test_a_layer_is_near_the_one_it_was_made_of_and_has_gradients(kind, bias) -> None:
    linear, x = plain(bias=bias), randn(2, 5, 96).requires_grad_()
    layer = LINEARS[kind].from_linear(linear.eval())
    y, dense = layer(x), layer.dense_weight()
    assert not layer.training
    assert dense.dtype == torch.float32
    assert (dense - linear.weight).norm() <= ERRORS[kind] * linear.weight.norm()
    rounded = ERRORS[kind] if kind == "int8" else 1e-5
    assert (y - nn.functional.linear(x, dense, linear.bias)).norm() <= rounded * y.norm()
    assert [name for name, _ in layer.named_parameters()] == ["bias"] * bias
    y.sum().backward()
    torch.testing.assert_close(x.grad, dense.sum(0).expand(2, 5, 96), rtol=1e-4, atol=1e-5)
    if bias:
        assert layer.bias is not linear.bias
        assert torch.equal(layer.bias.grad, torch.full((40,), 10.0))


@KINDS
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_no_cast_changes_a_bit_and_results_have_the_dtype_of_x(kind, dtype) -> None:
    layer = LINEARS[kind].from_linear(plain())
    if kind == "int8":
        layer.calibrate(0.05, 120)
    before = copy.deepcopy(bits_of(layer))
    model = nn.Sequential(layer).to(dtype).to("cpu", torch.float32).to(dtype)
    assert all(map(torch.equal, bits_of(model[0]), before))
    assert [t.dtype for t in bits_of(model[0])] == [t.dtype for t in before]
    assert layer.bias.dtype == dtype
    assert model(randn(3, 96).to(dtype)).dtype == dtype


@KINDS
def test_state_dicts_load_to_the_same_bits_and_refuse_others_by_name(kind) -> None:
    layer, x = LINEARS[kind].from_linear(plain()), randn(3, 96)
    state = nn.Sequential(layer).state_dict()
    for assign in (False, True):
        other = nn.Sequential(LINEARS[kind](96, 40))
        other.load_state_dict(state, assign=assign)
        assert torch.equal(other(x), layer(x))
    with torch.device("meta"):
        empty = nn.Sequential(LINEARS[kind](96, 40))
    assert empty(x.to("meta")).shape == (3, 40)
    empty.load_state_dict(state, assign=True)
    assert torch.equal(empty(x), layer(x))
    narrow = LINEARS[kind](96, 20)
    before = copy.deepcopy(bits_of(narrow))
    with pytest.raises(RuntimeError, match=r"weight.*40.*20"):
        narrow.load_state_dict(layer.state_dict())
    with pytest.raises(RuntimeError, match=r"not quantized"):
        narrow.load_state_dict(plain(96, 20).state_dict(), strict=False)
    assert all(map(torch.equal, bits_of(narrow), before))


def test_a_static_layer_loads_into_a_static_one_alone() -> None:
    layer = LinearInt8.from_linear(plain())
    layer.calibrate(torch.tensor(0.02), torch.tensor(7))
    other = LinearInt8(96, 40, static=True)
    other.load_state_dict(layer.state_dict())
    assert other.static
    assert torch.equal(other(randn(3, 96)), layer(randn(3, 96)))
    with pytest.raises(RuntimeError, match="Unexpected key.*input_scale"):
        LinearInt8(96, 40).load_state_dict(layer.state_dict())
    with pytest.raises(RuntimeError, match="Missing key.*input_scale"):
        other.load_state_dict(LinearInt8(96, 40).state_dict())


@pytest.mark.parametrize(
    ("scale", "zero_point", "message"),
    [
        (0.0, 3, "input_scale=0.0 must be positive and finite"),
        (float("nan"), 3, "input_scale=nan must be"),
        (1.0, 256, "input_zero_point=256 must be from 0 to 255"),
        (torch.ones(2), 3, r"shapes \(2,\) and \(\); expected one number each"),
    ],
)
def test_calibration_refuses_what_rounds_nothing(scale, zero_point, message) -> None:
    layer = LinearInt8(4, 4)
    with pytest.raises(ValueError, match=message):
        layer.calibrate(scale, zero_point)
    assert not layer.static


@KINDS
def test_what_is_no_linear_or_no_number_is_refused(kind) -> None:
    with pytest.raises(TypeError, match="linear is a Conv1d; expected an nn.Linear"):
        LINEARS[kind].from_linear(nn.Conv1d(2, 2, 1))
    if kind != "nf4":
        broken = plain()
        broken.weight.data[3, 3] = torch.nan
        with pytest.raises(ValueError, match="holds NaN or infinity"):
            LINEARS[kind].from_linear(broken)


# ---- quick calls -------------------------------------------------------------------------------------------------


@KINDS
@pytest.mark.native
@pytest.mark.parametrize("shape", [(96,), (1, 96), (2, 3, 96), (1, 20, 96), (0, 96), (3, 0, 96)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_a_quick_call_gives_the_bits_of_the_op(kind, shape, dtype, poisoned_memory) -> None:
    layer, rows = LINEARS[kind].from_linear(plain()), randn(*shape).to(dtype)
    for x in (rows, torch.stack([rows, rows], dim=-1)[..., 0]):
        with torch.no_grad():
            expected = op(layer, x)
            for _ in range(2):
                y = layer(x)
                assert (y.shape, y.dtype) == (expected.shape, expected.dtype)
                assert torch.equal(y, expected)


@KINDS
@torch.no_grad()
def test_a_quick_call_notices_what_has_changed(kind) -> None:
    layer, x = LINEARS[kind].from_linear(plain()), randn(2, 96)
    before = layer(x)
    other = LINEARS[kind].from_linear(plain(96, 40).requires_grad_(False))
    other.bias = nn.Parameter(torch.ones(40))
    layer.bias = other.bias
    assert torch.equal(layer(x), op(layer, x))
    assert not torch.equal(layer(x), before)
    layer.weight = layer.weight.clone().zero_()
    assert torch.equal(layer(x), op(layer, x))
    layer.bias.data = torch.full((40,), 2.0)
    assert torch.equal(layer(x), op(layer, x))
    layer.bias.mul_(3)
    assert torch.equal(layer(x), op(layer, x))
    copied = copy.deepcopy(layer)
    copied.bias.zero_()
    assert torch.equal(copied(x), op(copied, x))
    assert torch.equal(pickle.loads(pickle.dumps(layer))(x), layer(x))


@KINDS
def test_what_watches_a_call_is_not_passed_by(kind) -> None:
    layer, x = LINEARS[kind].from_linear(plain()), randn(2, 96)
    with torch.no_grad():
        expected = layer(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert layer(x).dtype == torch.bfloat16
        name = {"int8": "linear_int8", "int4": "linear_int4", "nf4": "linear_4bit"}[kind]
        with neural_layers.use_backend(**{name: "reference"}):
            torch.testing.assert_close(layer(x), expected)
        torch.testing.assert_close(torch.compile(layer, fullgraph=True, backend="aot_eager")(x), expected)
    assert layer(x).requires_grad  # the bias
    layer.bias.requires_grad_(False)
    assert not layer(x).requires_grad
    assert layer(x.requires_grad_()).requires_grad
    with pytest.raises(ValueError, match=r"x has shape \(2, 95\)"):
        layer(randn(2, 95))


@KINDS
def test_a_layer_is_exported_for_any_number_of_rows(kind) -> None:
    layer, x = LINEARS[kind].from_linear(plain()).eval(), randn(3, 96)
    exported = torch.export.export(layer, (x,), dynamic_shapes=({0: torch.export.Dim("rows")},)).module()
    for rows in (3, 40):
        torch.testing.assert_close(exported(randn(rows, 96)), layer(randn(rows, 96)))


# ---- embeddings --------------------------------------------------------------------------------------------------


@KINDS
@pytest.mark.parametrize("width", [96, 33, 256])
def test_an_embedding_restores_the_rows_that_are_asked_for(kind, width) -> None:
    embedding, ids = table(50, width, padding_idx=3), torch.randint(0, 50, (2, 7))
    layer = TABLES[kind].from_embedding(embedding)
    assert layer.padding_idx == 3
    assert torch.equal(layer(ids), layer.dense_weight()[ids])
    assert (layer(ids) - embedding(ids)).norm() <= ERRORS[kind] * embedding(ids).norm()
    assert layer(ids[:0]).shape == (0, 7, width)
    assert layer(torch.tensor(4)).shape == (width,)
    with pytest.raises(IndexError):
        layer(torch.tensor([50]))
    with pytest.raises(IndexError):
        layer(torch.tensor([-1]))
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(ids), layer(ids))


@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("width", [64, 100])
def test_a_double_quantized_embedding_restores_its_rows_too(quant_type, width) -> None:
    layer, ids = Embedding4bit.from_embedding(table(700, width), quant_type, 32, True), torch.tensor([0, 699, 350])
    assert torch.equal(layer(ids), F.dequantize_4bit(layer.quantized)[ids])


@KINDS
def test_casts_change_what_a_lookup_returns_and_no_bit(kind) -> None:
    layer, ids = TABLES[kind].from_embedding(table().double()), torch.tensor([1, 2])
    assert layer(ids).dtype == torch.float64
    before = copy.deepcopy(bits_of(layer))
    assert layer.half()(ids).dtype == torch.float16
    assert nn.Sequential(layer).to(torch.bfloat16)(ids).dtype == torch.bfloat16
    assert all(map(torch.equal, bits_of(layer), before))
    assert layer.to("meta")(ids.to("meta")).shape == (2, 96)


@KINDS
def test_a_head_shares_the_bits_of_its_embedding(kind) -> None:
    embedding = TABLES[kind].from_embedding(table())
    head = LINEARS[kind](96, 50, bias=False).share(embedding)
    model = nn.ModuleDict({"embedding": embedding, "head": head})
    for same in (model, copy.deepcopy(model), copy.deepcopy(model).to(torch.bfloat16)):
        for name in same["embedding"].bits:
            assert same["head"]._buffers[name] is same["embedding"]._buffers[name]
    assert torch.equal(head.dense_weight(), embedding.dense_weight())
    other = nn.ModuleDict({"embedding": TABLES[kind](50, 96)})
    other["head"] = LINEARS[kind](96, 50, bias=False).share(other["embedding"])
    other.load_state_dict(model.state_dict())
    assert torch.equal(other["head"](randn(2, 96)), head(randn(2, 96)))
    with pytest.raises(ValueError, match=r"the embedding is \(50, 96\); expected \(51, 96\)"):
        LINEARS[kind](96, 51).share(embedding)
    with pytest.raises(TypeError, match="the embedding is a Embedding; expected an Embedding"):
        LINEARS[kind](96, 50).share(table())


@KINDS
def test_an_embedding_that_cannot_be_frozen_is_refused(kind) -> None:
    with pytest.raises(ValueError, match="max_norm=1.0 changes the table"):
        TABLES[kind].from_embedding(nn.Embedding(5, 32, max_norm=1.0))
    with pytest.raises(TypeError, match="embedding is a Linear; expected an nn.Embedding"):
        TABLES[kind].from_embedding(plain())
