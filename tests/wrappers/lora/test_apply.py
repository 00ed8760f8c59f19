"""What an adapter is put around, what trains then, and what is refused."""

import copy

import pytest
import torch
from torch import nn

from neural_layers.linear_4bit import Linear4bit
from neural_layers.linear_int4 import LinearInt4
from neural_layers.linear_int8 import LinearInt8
from neural_layers.wrappers.lora import (
    LoRAConfig,
    LoRAConv1d,
    LoRALinear,
    apply_lora,
    merge_lora,
    remove_adapter,
)
from neural_layers.wrappers.modules import replace_module
from tests.wrappers.lora.samples import everywhere, hybrid, tokens, trained


def loss_of(model, ids):
    return model.train()(ids, labels=ids).loss


@pytest.mark.parametrize("dora", [False, True])
def test_every_projection_trains_by_the_gradient_of_the_loss(dora) -> None:
    model, ids = hybrid(), tokens()
    report = trained(model, everywhere(use_dora=dora))
    mixers = {name.rpartition(".")[2] for name in report.matched if ".mixer." in name}
    assert mixers == {
        "in_proj", "x_proj", "dt_proj", "out_proj", "conv1d", "q_proj", "k_proj", "v_proj", "o_proj",
    }  # fmt: skip
    loss_of(model, ids).backward()
    parameters = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all(".adapters.default." in name for name in parameters)
    assert len(parameters) == (3 if dora else 2) * len(report.layers)
    for name, parameter in parameters.items():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().max() > 0, name
        if dora and "magnitude" not in name:
            continue  # the norm is held constant in the gradient, and is none in a difference
        direction = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
        values = []
        for sign in (1, -1):
            with torch.no_grad():
                parameter.add_(sign * 1e-5 * direction)
                values.append(loss_of(model, ids).item())
                parameter.sub_(sign * 1e-5 * direction)
        difference = (values[0] - values[1]) / 2e-5
        assert (parameter.grad * direction).sum().item() == pytest.approx(difference, rel=1e-4, abs=1e-9), name


def test_a_new_adapter_changes_nothing_and_freezes_the_rest() -> None:
    model, ids = hybrid(), tokens()
    before = model(ids).logits
    report = apply_lora(model, everywhere(use_dora=True))
    torch.testing.assert_close(model(ids).logits, before, rtol=1e-13, atol=1e-13)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert report.trainable == trainable == sum(layer.parameters for layer in report.layers)
    assert report.total == sum(p.numel() for p in model.parameters())
    assert report.trainable_bytes == 8 * trainable
    assert report.total_bytes == 8 * report.total + sum(b.numel() * b.element_size() for b in model.buffers())
    assert report.share == trainable / report.total
    assert "model.layers.*.mixer.inner.in_proj" in str(report)
    assert f"{trainable:,} of {report.total:,} parameters train" in str(report)


def test_all_linear_is_every_linear_layer_but_the_head() -> None:
    model = hybrid()
    report = apply_lora(model, LoRAConfig(r=2, target_modules="all-linear"))
    linear = {n.removesuffix(".base_layer") for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    assert set(report.matched) == linear - {"lm_head"}


def test_layers_and_patterns_choose_modules_ranks_and_scales() -> None:
    model = hybrid()
    config = LoRAConfig(
        r=3,
        alpha=6,
        target_modules=("re:.*_proj",),
        layers=(0, 2),
        rank_pattern={"x_proj": 2, "model.layers.2.*": 1},
        alpha_pattern={"in_proj": 9},
        use_rslora=True,
    )
    report = apply_lora(model, config)
    ranks = {layer.name: layer.r for layer in report.layers}
    assert {name.split(".")[2] for name in ranks} == {"0", "2"}
    assert ranks["model.layers.0.mixer.inner.x_proj"] == 2
    assert ranks["model.layers.0.mixer.inner.in_proj"] == 3
    assert all(r == 1 for name, r in ranks.items() if name.startswith("model.layers.2."))
    inner = model.model.layers[0].mixer.inner
    assert inner.in_proj.adapters["default"].settings.scale == 9 / 3**0.5
    assert inner.x_proj.adapters["default"].settings.scale == 6 / 2**0.5


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (LoRAConfig(target_modules=("q_prj",)), r"'q_prj' matches no module; the nearest are .*q_proj"),
        (LoRAConfig(target_modules=("norm",)), r"'norm' matches a .*\.RMSNorm, which takes no adapter"),
        (LoRAConfig(r=17), r"q_proj: r=17 is above the rank 16 .* rank_pattern"),
        (LoRAConfig(r=8, target_modules=("conv1d",)), r"conv1d: r=8 is above the rank 4 .* rank_pattern"),
        (LoRAConfig(layers=(7,)), r"layers=7 has no module of target_modules; those that have: 2"),
        (LoRAConfig(rank_pattern={"k_proj": 2}), r"rank_pattern: 'k_proj' matches no module"),
        (LoRAConfig(alpha_pattern={"v_prj": 2}), r"alpha_pattern: 'v_prj' matches no module.*v_proj"),
    ],
)
def test_what_does_not_fit_is_refused_and_the_model_stays(config, message) -> None:
    model = hybrid()
    before = [(name, type(m)) for name, m in model.named_modules()]
    with pytest.raises(ValueError, match=message):
        apply_lora(model, config)
    assert [(name, type(m)) for name, m in model.named_modules()] == before
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"r": 0}, "r=0 must be a whole number of at least 1"),
        ({"r": 2.0}, "r=2.0 must be"),
        ({"rank_pattern": {"a": -1}}, "rank_pattern"),
        ({"alpha": 0}, "alpha=0 must be a positive number"),
        ({"alpha_pattern": {"a": float("nan")}}, "alpha_pattern"),
        ({"dropout": 1.0}, r"dropout=1.0 must lie in \[0, 1\)"),
        ({"target_modules": ()}, "target_modules"),
        ({"layers": (-1,)}, "layers"),
        ({"target_modules": ("re:(",)}, "not a regular expression"),
    ],
)
def test_a_config_checks_itself(fields, message) -> None:
    with pytest.raises(ValueError, match=message):
        LoRAConfig(**fields)


def test_a_name_is_given_once_and_not_while_adapters_are_merged() -> None:
    model = hybrid()
    apply_lora(model, LoRAConfig(r=1))
    with pytest.raises(ValueError, match="there is an adapter 'default' already"):
        apply_lora(model, LoRAConfig(r=1))
    for name in ("", "a.b", "forward"):
        with pytest.raises(ValueError, match="cannot be named"):
            apply_lora(model, LoRAConfig(r=1), name)
    merge_lora(model)
    with pytest.raises(ValueError, match="merged into .*q_proj; unmerge_lora"):
        apply_lora(model, LoRAConfig(r=1), "second")


@pytest.mark.parametrize("make", [Linear4bit.from_linear, LinearInt8.from_linear, LinearInt4.from_linear])
def test_quantized_layers_take_adapters_whose_gradients_are_those_of_the_dense_weight(make) -> None:
    torch.manual_seed(0)
    plain = nn.Linear(70, 20)
    base, x = make(plain), torch.randn(5, 70)
    dense = nn.Linear(70, 20)
    dense.load_state_dict({"weight": base.dense_weight(), "bias": base.bias})
    models = [nn.Sequential(base), nn.Sequential(dense)]
    gradients, outputs = [], []
    for model in models:
        torch.manual_seed(1)
        trained(model, LoRAConfig(r=4, target_modules="all-linear", use_dora=True))
        out = model(x)
        (out * torch.arange(20)).sum().backward()
        outputs.append(out.detach())
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
        assert model[0].in_features == 70
        assert model[0].out_features == 20
    rounding = 0.03 if isinstance(base, LinearInt8) else 1e-5  # its inputs are rounded too
    torch.testing.assert_close(outputs[0], outputs[1], rtol=rounding, atol=rounding)
    for own, other in zip(*gradients, strict=True):
        assert (own - other).norm() <= rounding * other.norm()


def test_weights_that_torch_reads_itself_are_left_alone_and_told() -> None:
    model = nn.TransformerDecoderLayer(8, 2, 16, batch_first=True)
    report = apply_lora(model, LoRAConfig(r=2, target_modules="all-linear"))
    assert set(report.matched) == {"linear1", "linear2"}
    assert "self_attn.out_proj" in report.skipped
    assert "skipped: self_attn.out_proj (torch reads its weight" in str(report)
    with pytest.raises(ValueError, match="torch reads itself"):
        apply_lora(nn.TransformerDecoderLayer(8, 2, 16), LoRAConfig(r=2, target_modules=("out_proj",)))


def test_a_module_that_stands_in_several_places_is_wrapped_in_all_of_them() -> None:
    shared = nn.Linear(4, 4)
    model = nn.ModuleDict({"first": shared, "second": nn.Sequential(shared), "other": nn.Linear(4, 4)})
    report = apply_lora(model, LoRAConfig(r=2, target_modules=("first",)))
    assert report.matched == ("first",)
    assert model["first"] is model["second"][0]
    assert isinstance(model["first"], LoRALinear)
    remove_adapter(model, "default")
    assert model["first"] is model["second"][0] is shared


@pytest.mark.parametrize("options", [{}, {"groups": 2, "stride": 2}, {"padding": 2, "padding_mode": "circular"}])
@pytest.mark.parametrize("dora", [False, True])
def test_any_conv1d_is_convolved_by_its_changed_weight(options, dora) -> None:
    torch.manual_seed(0)
    conv = nn.Conv1d(4, 6, 3, **options).double()
    model, x = nn.Sequential(copy.deepcopy(conv)), torch.randn(2, 4, 9, dtype=torch.float64, requires_grad=True)
    trained(model, LoRAConfig(r=2, target_modules=("0",), use_dora=dora))
    assert isinstance(model[0], LoRAConv1d)
    delta = model[0].adapters["default"].product().view_as(conv.weight)
    changed = conv.weight + delta
    if dora:
        changed = changed / changed.norm(dim=(1, 2), keepdim=True)
        changed = changed * model[0].adapters["default"].magnitude.view(-1, 1, 1)
    conv.weight.data = changed.detach()
    torch.testing.assert_close(model(x), conv(x))
    torch.testing.assert_close(model[0].weight, conv.weight)


@pytest.mark.parametrize("dora", [False, True])
def test_gradcheck_of_a_wrapped_layer(dora) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(5, 4)).double()
    trained(model, LoRAConfig(r=2, target_modules=("0",), use_dora=dora))
    layer = model[0]
    adapter = layer.adapters["default"]
    x = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    # DoRA's norm is a constant of its gradient, so that only x and the magnitude agree with differences.
    inputs = (x, adapter.magnitude) if dora else (x, adapter.lora_A, adapter.lora_B)
    assert torch.autograd.gradcheck(lambda *_: layer(x), inputs)


def test_half_precision_bases_train_in_float32_and_answer_in_their_own_dtype() -> None:
    model, ids = hybrid(dtype=torch.bfloat16), tokens()
    before = model(ids).logits
    trained(model, everywhere())
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert model(ids).logits.dtype == before.dtype == torch.bfloat16
    loss_of(model, ids).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_a_single_vector_is_adapted_as_rows_are() -> None:
    model = nn.Sequential(nn.Linear(5, 7)).double()
    trained(model, LoRAConfig(r=2, target_modules=("0",)))
    rows = torch.randn(3, 5, dtype=torch.float64)
    torch.testing.assert_close(model(rows[1]), model(rows)[1])


def test_where_nothing_takes_an_adapter_what_does_is_told() -> None:
    transformers = pytest.importorskip("transformers", reason="needs the extra models")
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=9, n_embd=8, n_layer=1, n_head=2))
    taken = "torch.nn.Linear, Embedding and Conv1d do"
    with pytest.raises(
        ValueError, match=rf"'c_attn' matches a transformers.*\.Conv1D, which takes no adapter; {taken}"
    ):
        apply_lora(model, LoRAConfig(target_modules=("c_attn",)))
    with pytest.raises(ValueError, match=f"matches no module inside the GPT2LMHeadModel; {taken}"):
        apply_lora(model, LoRAConfig(target_modules="all-linear"))


def test_an_embedding_that_rewrites_its_weight_is_refused() -> None:
    model = nn.Sequential(nn.Embedding(5, 4, max_norm=1.0))
    with pytest.raises(ValueError, match="max_norm"):
        apply_lora(model, LoRAConfig(r=1, target_modules=("0",)))
    replace_module(model, "0", nn.Embedding(5, 4, padding_idx=0))
    apply_lora(model, LoRAConfig(r=1, target_modules=("0",)))
    model(torch.tensor([0, 1, 2])).sum().backward()
    assert not model[0].adapters["default"].lora_A.grad[:, 0].any()
