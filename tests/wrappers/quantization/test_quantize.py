"""Which layers `quantize` takes, what it makes of them, and that it is all or nothing."""

import copy
from itertools import pairwise

import pytest
import torch
import torch.nn.utils.prune
from torch import nn

from neural_layers import Linear4bit
from neural_layers.linear import dense_weight
from neural_layers.linear_int4 import LinearInt4
from neural_layers.linear_int8 import LinearInt8
from neural_layers.quantized_embedding import Embedding4bit, EmbeddingInt4, EmbeddingInt8
from neural_layers.wrappers.modules import tensor_bytes
from neural_layers.wrappers.quantization import Plan, quantize
from neural_layers.wrappers.quantization.half import EmbeddingHalf, LinearHalf
from tests.wrappers.quantization.samples import SCHEMES, cvm, hybrid, inputs, outputs, quantized, tower

KINDS = {
    "float16": (LinearHalf, EmbeddingHalf),
    "bfloat16": (LinearHalf, EmbeddingHalf),
    "int8_dynamic": (LinearInt8, EmbeddingInt8),
    "int8_static": (LinearInt8, EmbeddingInt8),
    "int4": (LinearInt4, EmbeddingInt4),
    "nf4": (Linear4bit, Embedding4bit),
    "fp4": (Linear4bit, Embedding4bit),
}
# Half of the widest step of a scheme, as a share of a row's or block's largest magnitude (int4: of its range).
HALF_STEP = {"float16": 2**-11, "bfloat16": 2**-8, "int8_dynamic": 1 / 254, "int4": 2 / 29, "nf4": 0.152, "fp4": 1 / 6}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_each_scheme_makes_its_layers_and_keeps_the_weights_near(scheme) -> None:
    plain, model = tower(), quantized(tower(), scheme)
    assert (type(model.first[0]), type(model.embed)) == KINDS[scheme]
    assert type(model.head) is KINDS[scheme][0]
    bound = HALF_STEP.get(scheme, 1 / 254)
    for name in ("first.0", "embed", "head"):
        before, after = plain.get_submodule(name).weight.double(), dense_weight(model.get_submodule(name)).double()
        assert after.shape == before.shape
        assert (after - before).abs().max() <= bound * before.abs().amax() * 1.0001
    error = (outputs(model) - outputs(plain)).norm() / outputs(plain).norm()
    assert error < {"float16": 1e-3, "bfloat16": 1e-2, "int8_dynamic": 2e-2, "int8_static": 5e-2}.get(scheme, 0.3)
    assert model.first[0].bias.requires_grad
    assert torch.equal(model.first[0].bias, plain.first[0].bias)
    x = torch.randn(3, 64, requires_grad=True)
    model.first(x).sum().backward()
    assert x.grad is not None
    assert x.grad.abs().max() > 0


def test_more_bits_err_less() -> None:
    plain = outputs(tower())
    errors = [
        float((outputs(quantized(tower(), scheme)) - plain).norm()) for scheme in ("float16", "int8_dynamic", "nf4")
    ]
    assert all(a < b for a, b in pairwise(errors))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_shared_weights_and_modules_stay_shared(scheme) -> None:
    model = quantized(tower(), scheme)
    assert model.again is model.first
    for name in model.embed.bits:
        assert model.head._buffers[name] is model.embed._buffers[name]
    for moved in (copy.deepcopy(model), copy.deepcopy(model).double(), copy.deepcopy(model).to("cpu")):
        assert moved.head.weight is moved.embed.weight
    state = model.state_dict()
    assert not [key for key in state if key.startswith("head.weight")]
    assert "head.bias" in state
    other = quantized(tower(seed=1), scheme)
    other.load_state_dict(state)
    assert torch.equal(outputs(other), outputs(model))


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("make", [hybrid, cvm])
def test_models_of_the_library_are_quantized_whole(make, scheme) -> None:
    model = quantized(make(), scheme)
    left = [n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.Embedding))]
    # Of four inputs a group of 64 would be larger than they are.
    assert left == (["model.layers.0.mixer.inner.dt_proj"] if make is hybrid and scheme == "int4" else [])
    assert outputs(model).isfinite().all()


def test_the_report_counts_bytes_and_says_what_was_left() -> None:
    model = tower()
    before = tensor_bytes(model)
    report = quantize(model, "int8_dynamic")
    layers = {layer.name: layer for layer in report.layers}
    assert list(layers) == ["embed", "first.0", "first.2", "head"]
    assert layers["first.0"].parameters == 64 * 96
    assert (layers["first.0"].bytes_before, layers["first.0"].bytes_after) == (4 * 64 * 96, 64 * 96 + 4 * 96)
    assert layers["head"].bytes_after == 0
    assert (report.bytes_before, report.bytes_after) == (before, tensor_bytes(model))
    assert report.ratio == before / tensor_bytes(model)
    assert set(report.skipped) == {"attention", "attention.out_proj", "conv"}
    assert "own" in report.skipped["attention.out_proj"] or "without calling" in report.skipped["attention.out_proj"]
    text = str(report)
    assert "first.0" in text
    assert "shared" in text
    assert "left as it is: conv (it is a Conv1d; only linear layers" in text


def test_patterns_choose_the_layers() -> None:
    assert set(Plan.of(quantized(tower(), "nf4", include="first.*")).layers) == {"first.0", "first.2"}
    assert set(Plan.of(quantized(tower(), "nf4", include=["again.0"])).layers) == {"first.0"}
    report = quantize(model := tower(), "nf4", exclude="re:first\\.\\d")
    assert set(Plan.of(model).layers) == {"embed", "head"}
    assert report.skipped["first.0"] == "excluded by 're:first\\\\.\\\\d'"
    report = quantize(model := tower(), "nf4", exclude="head")
    assert report.skipped["embed"].startswith("it shares a parameter with head: excluded by")
    assert set(Plan.of(model).layers) == {"first.0", "first.2"}
    report = quantize(model := tower(), "nf4", embeddings=False)
    assert report.skipped["embed"] == "embeddings=False"
    assert type(model.head) is nn.Linear
    assert model.head.weight is model.embed.weight


def test_layers_can_be_quantized_in_several_calls() -> None:
    model = tower()
    quantize(model, "int8_dynamic", include=["embed", "head"])
    quantize(model, "nf4", exclude=["embed", "head"], double_quant=True, block_size=128)
    plan = Plan.of(model)
    assert plan.layers["first.2"] == {"scheme": "nf4", "block_size": 128, "double_quant": True}
    assert plan.layers["head"] == {"scheme": "int8_dynamic", "shares": "embed"}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_plan_read_off_a_model_makes_the_same_model(scheme) -> None:
    model = quantized(tower(), scheme)
    plan = Plan.from_json(Plan.of(model).to_json())
    assert plan == Plan.of(model)
    other = tower()
    quantize(other, plan, **({"calibration": [inputs(other)]} if scheme == "int8_static" else {}))
    assert torch.equal(outputs(other), outputs(model))


def test_two_linear_layers_of_one_weight_stay_one() -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model[1].weight = model[0].weight
    quantize(model, "int8_static", calibration=[torch.randn(4, 64)])
    assert model[0].weight is model[1].weight
    assert model[0].input_scale != model[1].input_scale
    copied = copy.deepcopy(model).double()
    assert copied[0].input_scale != copied[1].input_scale


@pytest.mark.parametrize("scheme", [*SCHEMES, "int8_qat"])
def test_lookups_refuse_what_plain_ones_refuse(scheme) -> None:
    plain, table = tower().embed, quantized(tower(), scheme).embed
    for ids in (torch.tensor([1.5]), torch.tensor([True]), torch.tensor([1], dtype=torch.uint8)):
        for lookup in (plain, table):
            with pytest.raises((TypeError, RuntimeError), match="dtype|scalar type"):
                lookup(ids)
    for ids in (torch.tensor([-1]), torch.tensor([40])):
        for lookup in (plain, table):
            with pytest.raises(IndexError):
                lookup(ids)
    assert torch.equal(table(torch.tensor([[3]], dtype=torch.int32)), table(torch.tensor([[3]])))
    assert table(torch.zeros(2, 0, dtype=torch.int64)).shape == (2, 0, 64)


def test_hooks_and_modes_go_over() -> None:
    model, seen = tower().train(), []
    model.first[0].register_forward_hook(lambda *_: seen.append(1))
    quantize(model, "nf4")
    model.eval()
    outputs(model)
    assert len(seen) == 2
    assert quantized(tower().train(), "nf4").first[0].training


def test_hooks_are_removed_and_called_as_before() -> None:
    model, calls = tower(), []
    handle = model.first[0].register_forward_hook(lambda *_: calls.append("forward"))
    model.first[0].register_full_backward_hook(lambda *_: calls.append("backward"))
    quantize(model, "nf4")
    model.first[0](torch.randn(2, 64, requires_grad=True)).sum().backward()
    assert calls == ["forward", "backward"]
    handle.remove()
    model.first[0](torch.randn(2, 64))
    assert calls == ["forward", "backward"]


def test_a_weight_that_float16_cannot_hold_is_refused() -> None:
    for name in ("first.0", "embed"):
        model = tower()
        model.get_submodule(name).weight.data[0, 0] = 1e6
        with pytest.raises(
            ValueError, match=rf"{name}: the weight reaches 1e\+06, and torch.float16 ends at 6.55e\+04"
        ):
            quantize(model, "float16")
        assert type(model.first[0]) is nn.Linear
        quantize(model, "bfloat16")


def test_weights_that_hooks_compute_are_left_and_told() -> None:
    model = nn.ModuleDict({"plain": nn.Linear(64, 64), "normed": nn.Linear(64, 64), "cut": nn.Linear(64, 64)})
    with pytest.warns(FutureWarning):
        nn.utils.weight_norm(model["normed"])
    torch.nn.utils.prune.l1_unstructured(model["cut"], "bias", amount=0.5)
    skipped = quantize(model, "int8_dynamic").skipped
    assert skipped["normed"].startswith("its weight is no parameter but computed before every call")
    assert skipped["cut"].startswith("its bias is no parameter")
    assert all(layer(torch.randn(2, 64)).shape == (2, 64) for layer in model.values())


class Scaled(nn.Linear):
    def forward(self, input):
        return 2 * super().forward(input)


def test_layers_that_a_scheme_cannot_take_are_named_with_the_reason() -> None:
    model = nn.ModuleDict(
        {
            "scaled": Scaled(64, 64),
            "normed": nn.utils.parametrizations.weight_norm(nn.Linear(64, 64)),
            "bounded": nn.Embedding(8, 64, max_norm=1.0),
            "narrow": nn.Linear(3, 64),
            "plain": nn.Linear(64, 64),
        }
    )
    skipped = quantize(model, "int4").skipped
    assert skipped["scaled"].startswith("a Scaled has a forward of its own")
    assert "parametrized" in skipped["normed"]
    assert "max_norm=1.0" in skipped["bounded"]
    assert skipped["narrow"] == f"it would grow from {4 * 4 * 64:,} to {64 * (32 + 5 + 4):,} bytes"
    assert set(Plan.of(model).layers) == {"plain"}


def layer(**changes) -> Plan:
    return Plan({"first.0": {"scheme": "nf4", **changes}})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scheme": "int3"}, "scheme='int3' must be one of 'float16', 'bfloat16'"),
        ({"scheme": "int8_dynamic", "block_size": 64}, "block_size=64: 'int8_dynamic' has no blocks"),
        ({"scheme": "nf4", "block_size": 48}, "block_size=48 must be one of 32, 64"),
        ({"scheme": "int4", "double_quant": True}, "double_quant=True: 'int4' has no scales"),
        ({"scheme": "nf4", "include": "q_prj"}, "the pattern 'q_prj' matches no module"),
        ({"scheme": "nf4", "exclude": "frst.0"}, "'frst.0' matches no module; the nearest are first.0"),
        (
            {"scheme": "nf4", "include": "conv"},
            "'conv' asks for 'conv', which cannot be quantized: it is a Conv1d; only",
        ),
        ({"scheme": "nf4", "include": "out_proj"}, "'attention.out_proj', which cannot be quantized"),
        ({"scheme": "nf4", "include": "head"}, "no layer is left to quantize"),
        ({"scheme": "int8_static"}, "int8_static needs calibration"),
        ({"scheme": "nf4", "calibration": []}, "calibration is for int8_static alone"),
        ({"scheme": "nf4", "observer": "mse"}, "observer is for int8_static alone"),
        ({"scheme": "int8_static", "calibration": [1], "observer": "max"}, "observer='max' must be one of 'minmax'"),
        ({"scheme": layer(), "exclude": "head"}, "include, exclude and embeddings are not for a Plan"),
        ({"scheme": layer(), "double_quant": True}, "double_quant and block_size are not for a Plan"),
        ({"scheme": Plan({"first.9": {"scheme": "nf4"}})}, "'first.9' matches no module; the nearest are first.2"),
        (
            {"scheme": Plan({"first.0": {"scheme": "nf4"}, "again.0": {"scheme": "int4"}})},
            "'first.0' and 'again.0' are one module; name it once",
        ),
        ({"scheme": Plan({"conv": {"scheme": "nf4"}})}, "'conv' cannot be quantized: it is a Conv1d"),
        (
            {"scheme": Plan({"head": {"scheme": "nf4"}})},
            "'head' cannot be quantized alone: it shares a parameter with embed",
        ),
        (
            {"scheme": Plan({"head": {"scheme": "nf4"}, "embed": {"scheme": "int4"}})},
            "'head' and 'embed' share a weight, and the plan has",
        ),
        (
            {"scheme": Plan({"first.0": {"scheme": "nf4", "shares": "first.2"}, "first.2": {"scheme": "nf4"}})},
            "the plan says that 'first.0' shares the weight of 'first.2'; in this model it does not",
        ),
    ],
)
def test_what_does_not_fit_is_refused_and_changes_nothing(arguments, message) -> None:
    model = tower()
    before, modules = outputs(model), dict(model.named_modules())
    with pytest.raises(ValueError, match=".*") as refused:
        quantize(model, **arguments)
    assert message in str(refused.value)
    assert dict(model.named_modules()) == modules
    assert torch.equal(outputs(model), before)


@pytest.mark.parametrize("scheme", [*SCHEMES, "int8_qat"])
def test_quantizing_twice_is_refused(scheme) -> None:
    model = quantized(tower(), scheme)
    modules = dict(model.named_modules())
    with pytest.raises(ValueError, match=r"'embed' is (quantized already|prepared for int8_qat already).*exclude it"):
        quantize(model, "nf4")
    with pytest.raises(ValueError, match="already"):
        quantize(model, Plan.of(model))
    assert dict(model.named_modules()) == modules


def test_weights_without_values_are_refused() -> None:
    model = tower()
    with torch.no_grad():
        model.first[2].weight[3, 4] = torch.nan
    with pytest.raises(ValueError, match=r"first\.2\.weight holds NaN or infinity"):
        quantize(model, "int8_dynamic")
    assert type(model.first[0]) is nn.Linear
    with torch.device("meta"):
        empty = tower()
    with pytest.raises(ValueError, match="lies on the meta device"):
        quantize(empty, "nf4")
    with pytest.raises(ValueError, match="the model is itself a Linear"):
        quantize(nn.Linear(4, 4), "nf4")
    with pytest.raises(ValueError, match="no layer is left to quantize"):
        quantize(nn.Sequential(nn.ReLU()), "nf4")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "the plan is not JSON"),
        ("[]", "the plan has no 'layers'"),
        ('{"layers": []}', "layers is a list"),
        ('{"layers": {"a": {}}}', "layer 'a': {} is no format"),
        ('{"layers": {"a": {"scheme": "nf5"}}}', "layer 'a': scheme='nf5' must be one of"),
        ('{"layers": {"a": {"scheme": "nf4", "bits": 4}}}', "layer 'a': 'bits' is no setting"),
        ('{"layers": {"a": {"scheme": "nf4", "shares": "b"}}}', "shares the weight of 'b', which"),
        ('{"layers": {"a": {"scheme": "nf4", "shares": "a"}}}', "'a', which is no other layer of the plan"),
        ('{"layers": {"a": {"scheme": "nf4", "shares": ["b"]}}}', "['b'], which is no other layer of the plan"),
        ('{"layers": {"a": {"scheme": "nf4", "block_size": 64.0}}}', "block_size=64.0 must be one of"),
        ('{"layers": {"a": {"scheme": "nf4", "double_quant": "no"}}}', "double_quant='no' must be True or False"),
    ],
)
def test_a_plan_that_is_none_is_refused(text, message) -> None:
    with pytest.raises(ValueError, match=".*") as refused:
        Plan.from_json(text)
    assert message in str(refused.value)
