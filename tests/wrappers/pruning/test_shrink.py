"""Removed units: the same outputs as with units that are masked, in float64; files, caches, and what is refused."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from neural_layers import CrossAttention, GeGLU, GroupedQueryAttention, Mamba, Mamba2, SwiGLU
from neural_layers.errors import InputError
from neural_layers.linear_4bit import Linear4bit
from neural_layers.wrappers import plan_shrink, prune, shrink
from neural_layers.wrappers.pruning import ShrinkPlan, mask_of, mask_units, masks, measured_scores, unit_scores
from neural_layers.wrappers.pruning.units import find_units


def randomise(model: nn.Module, seed: int) -> nn.Module:
    """Every parameter away from the values that make parts of a model do nothing."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator, dtype=torch.float64) * 0.3)
    return model


@st.composite
def modules(draw) -> tuple[nn.Module, str, float, int]:
    """A module, the kind of its units, a share of them to remove, and how many then stay."""
    seed, bias = draw(st.integers(0, 999)), draw(st.booleans())
    torch.manual_seed(seed)
    kind = draw(st.sampled_from(["feed_forward", "kv_heads", "query_heads", "mamba", "mamba2"]))
    if kind == "feed_forward":
        count, removed = draw(st.integers(3, 20)), draw(st.integers(1, 2))
        module: nn.Module = draw(st.sampled_from([SwiGLU, GeGLU]))(6, count, bias=bias)
    elif kind in ("kv_heads", "query_heads"):
        groups, per = draw(st.integers(2, 4)), draw(st.integers(2, 3))
        switches = {"qk_norm": draw(st.booleans()), "gate": draw(st.booleans()), "sinks": draw(st.booleans())}
        module = GroupedQueryAttention(6, groups * per, groups, head_dim=4, bias=bias, **switches)
        count, removed = (groups, 1) if kind == "kv_heads" else (per, 1)
    elif kind == "mamba":
        count, removed = 12, draw(st.integers(1, 10))
        module = Mamba(6, state_dim=3, bias=bias)
    else:
        groups, count, removed = draw(st.integers(1, 2)), 3, draw(st.integers(1, 2))
        norm = draw(st.booleans())
        inner = groups * count * 4
        module = Mamba2(6, 5, 4, groups, inner_dim=inner, bias=bias, norm=norm, bc_norm=draw(st.booleans()))
    return randomise(module.double(), seed), kind, removed / count, count - removed


@given(drawn=modules(), seed=st.integers(0, 99))
def test_a_shrunken_module_computes_what_the_masked_one_does(drawn: tuple, seed: int) -> None:
    module, kind, amount, kept = drawn
    x = torch.randn(2, 7, 6, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    plan = plan_shrink(module, {kind: amount})
    masked, small = copy.deepcopy(module), copy.deepcopy(module)
    mask_units(masked, plan)
    report = shrink(small, plan)
    (units,) = find_units(small, kind)
    assert units.count == kept * units.groups
    assert report.parameters_after < report.parameters_before
    expected, found = masked(x), small(x)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-12)
    assert not torch.allclose(found, module(x))
    ours, theirs = (torch.autograd.grad(model(probe).sum(), probe)[0] for model, probe in _leaves((small, masked), x))
    torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)


def _leaves(models: tuple, x: torch.Tensor) -> list[tuple]:
    return [(model, x.clone().requires_grad_()) for model in models]


def test_the_least_important_units_go_by_the_formula() -> None:
    module = SwiGLU(3, 5).double()
    made = torch.cat([module.gate_proj.weight, module.up_proj.weight], dim=1).norm(dim=1)
    expected = made * module.down_proj.weight.norm(dim=0)
    (units,) = find_units(module, "feed_forward")
    torch.testing.assert_close(unit_scores(units), expected, rtol=1e-12, atol=0)
    plan = plan_shrink(module, {"feed_forward": 0.4})
    assert plan.modules[""].kept == tuple(sorted(expected.topk(3).indices.tolist()))
    given_scores = torch.tensor([5.0, 1, 4, 2, 3])
    chosen = plan_shrink(module, {"feed_forward": 0.4}, scores={"": given_scores})
    assert chosen.modules[""].kept == (0, 2, 4)


def test_scores_on_data_are_weight_times_activation() -> None:
    module = randomise(GroupedQueryAttention(6, 4, 2, head_dim=4).double(), 0)
    batches = [torch.randn(2, 5, 6, dtype=torch.float64), torch.randn(1, 3, 6, dtype=torch.float64)]
    seen = []
    hook = module.o_proj.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].flatten(0, 1)))
    found = measured_scores(module, ["kv_heads"], batches)[""]
    hook.remove()
    contributions = torch.cat(seen).unsqueeze(1) * module.o_proj.weight.unsqueeze(0)  # (tokens, D, H · K)
    expected = contributions.square().sum((0, 1)).view(2, 8).sum(1).sqrt()
    torch.testing.assert_close(found, expected.detach(), rtol=1e-12, atol=0)
    plan = plan_shrink(module, {"kv_heads": 0.5}, scores={"": found})
    assert plan.modules[""].kept == (int(expected.argmax()),)
    with pytest.raises(ValueError, match="kind 'heads' must be one of"):
        measured_scores(module, ["heads"], batches)
    with pytest.raises(ValueError, match="the model has no units of kinds"):
        measured_scores(module, "mamba", batches)
    with pytest.raises(InputError, match="has no batch"):
        measured_scores(module, "kv_heads", [])


def test_widths_round_up_to_a_multiple() -> None:
    module = SwiGLU(4, 24)
    plan = plan_shrink(module, {"feed_forward": 0.5}, multiple_of=8)
    assert len(plan.modules[""].kept) == 16
    assert len(plan_shrink(module, {"feed_forward": 0.01}, multiple_of=16).modules[""].kept) == 24


def test_cross_attention_shrinks_with_its_context() -> None:
    module = randomise(CrossAttention(6, 4, 2, head_dim=3, context_dim=5).double(), 0)
    x, context = torch.randn(2, 3, 6, dtype=torch.float64), torch.randn(2, 4, 5, dtype=torch.float64)
    plan = plan_shrink(module, {"kv_heads": 0.5})
    masked = copy.deepcopy(module)
    mask_units(masked, plan)
    shrink(module, plan)
    torch.testing.assert_close(module(x, context), masked(x, context), rtol=1e-12, atol=1e-13)


def test_a_plan_is_replayed_on_a_fresh_module() -> None:
    module, fresh = randomise(Mamba(6).double(), 0), Mamba(6).double()
    report = shrink(module, {"mamba": 0.5})
    shrink(fresh, ShrinkPlan.from_json(report.plan.to_json()))
    fresh.load_state_dict(module.state_dict())
    x = torch.randn(1, 5, 6, dtype=torch.float64)
    assert torch.equal(fresh(x), module(x))
    assert report.plan == ShrinkPlan.from_json(report.plan.to_json())
    with pytest.raises(InputError, match="this is no plan"):
        ShrinkPlan.from_json("[1]")
    with pytest.raises(InputError, match="which this model has not"):
        shrink(SwiGLU(4, 6), ShrinkPlan({"mixer": report.plan.modules[""]}))
    with pytest.raises(InputError, match="with 12 mamba, and this one has 6"):
        shrink(module, report.plan)


def test_masks_are_cut_as_their_weights_are() -> None:
    module = SwiGLU(6, 10).double()
    prune(module, "l1", 0.5)
    plan = plan_shrink(module, {"feed_forward": 0.3})
    kept = list(plan.modules[""].kept)
    before = mask_of(module.gate_proj)
    shrink(module, plan)
    assert torch.equal(mask_of(module.gate_proj), before[kept])
    assert mask_of(module.down_proj).shape == (6, 7)
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    module(torch.randn(3, 6, dtype=torch.float64)).sum().backward()
    optimizer.step()
    assert all((layer.weight[~mask_of(layer)] == 0).all() for layer in (module.gate_proj, module.down_proj))


class _Pair(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = SwiGLU(4, 6), SwiGLU(4, 6)
        self.attention = GroupedQueryAttention(8, 4, 2)


def refusals() -> list[tuple[dict, dict, str]]:
    half = {"feed_forward": 0.5}
    return [
        ({}, {}, r"amounts=\{\} must give shares to some of feed_forward"),
        ({"heads": 0.5}, {}, "must give shares to some of"),
        ({"feed_forward": 1.0}, {}, r"feed_forward=1.0 must be a number in \[0, 1\)"),
        ({"feed_forward": 0.95}, {}, "feed_forward=0.95 would leave nothing of the 6 units in a"),
        ({"kv_heads": 0.3}, {}, r"kv_heads=0.3 of the 2 heads in attention is no whole number; possible are 0.5"),
        ({"query_heads": 0.25}, {}, r"of the 2 heads of each of its 2 groups in attention"),
        ({"kv_heads": 0.5, "query_heads": 0.5}, {}, "shrink the one, then the other"),
        ({"mamba": 0.5}, {}, r"the model has no mamba to remove: there are feed_forward in 2 modules"),
        (half, {"include": ["c"]}, "'c' matches no module"),
        (half, {"include": ["a"], "exclude": ["a"]}, "leave no module to shrink"),
        (half, {"scores": {"c": torch.ones(6)}}, "scores hold 'c', which has no such units; there are a, b"),
        (half, {"scores": {"a": torch.ones(5)}}, r"scores of a have shape \(5,\); it has 6 units"),
        (half, {"scores": {"a": torch.full((6,), torch.nan)}}, "scores of a hold NaN"),
        (half, {"multiple_of": 0}, "multiple_of=0 must be a positive integer"),
    ]


@pytest.mark.parametrize(("amounts", "options", "message"), refusals())
def test_bad_input_is_told(amounts: dict, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        shrink(_Pair(), amounts, **options)


def test_what_cannot_be_taken_apart_is_named_and_left_as_it_was() -> None:
    pair = _Pair()
    pair.b.up_proj = Linear4bit.from_linear(nn.Linear(64, 64))
    with pytest.raises(ValueError, match=r"b.up_proj is a Linear4bit, .* shrink before quantize"):
        shrink(pair, {"feed_forward": 0.5})
    assert pair.a.up_proj.weight.shape == (6, 4)
    pair = _Pair()
    pair.b.down_proj.weight = pair.a.down_proj.weight
    with pytest.raises(ValueError, match=r"weight of a is shared by a.down_proj, b.down_proj"):
        shrink(pair, {"feed_forward": 0.5})
    assert pair.a.up_proj.weight.shape == (6, 4)
    pair = _Pair()
    pair.a.extra = nn.Parameter(torch.ones(6))
    with pytest.raises(ValueError, match=r"a.extra is not known of such a layer"):
        shrink(pair, {"feed_forward": 0.5})
    with pytest.raises(ValueError, match="has ALiBi, whose slopes follow"):
        shrink(GroupedQueryAttention(8, 4, 2, position="alibi"), {"kv_heads": 0.5})
    plan = plan_shrink(_Pair(), {"feed_forward": 0.5})
    with pytest.raises(ValueError, match="multiple_of is for choosing units"):
        shrink(_Pair(), plan, multiple_of=2)
    assert not masks(pair)
