"""Which weights `prune` sets to zero, by torch.nn.utils.prune and by definitions; what it refuses."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import prune as judge

from neural_layers.linear_4bit import Linear4bit
from neural_layers.wrappers import prune
from neural_layers.wrappers.pruning import mask_of, masks, sparsity

amounts = st.floats(0.0, 0.95)
sizes = st.integers(2, 17)
seeds = st.integers(0, 2**16)


def make_layers(rows: int, columns: int, seed: int, count: int = 2) -> nn.Sequential:
    torch.manual_seed(seed)
    layers = [nn.Linear(columns if i % 2 == 0 else rows, rows if i % 2 == 0 else columns) for i in range(count)]
    return nn.Sequential(*layers).double()


def judged(model: nn.Module) -> list[torch.Tensor]:
    return [layer.weight_mask.bool() for layer in model]


@given(rows=sizes, columns=sizes, amount=amounts, seed=seeds)
def test_l1_prunes_what_torch_prunes(rows: int, columns: int, amount: float, seed: int) -> None:
    ours, theirs = make_layers(rows, columns, seed), make_layers(rows, columns, seed)
    if round(amount * rows * columns) == rows * columns:
        return
    prune(ours, "l1", amount)
    for layer in theirs:
        judge.l1_unstructured(layer, "weight", amount)
    for mine, other, mask in zip(ours, theirs, judged(theirs), strict=True):
        assert torch.equal(mask_of(mine), mask)
        assert torch.equal(mine.weight, other.weight)


@given(rows=sizes, columns=sizes, amount=st.floats(0.0, 0.4), seed=seeds)
def test_global_l1_prunes_what_torch_prunes(rows: int, columns: int, amount: float, seed: int) -> None:
    ours, theirs = make_layers(rows, columns, seed, count=3), make_layers(rows, columns, seed, count=3)
    judge.global_unstructured([(layer, "weight") for layer in theirs], judge.L1Unstructured, amount=amount)
    report = prune(ours, "l1", amount, scope="global")
    for mine, mask in zip(ours, judged(theirs), strict=True):
        assert torch.equal(mask_of(mine), mask)
    assert report.zeros == round(amount * report.weights)


@given(
    rows=sizes, columns=sizes, amount=st.floats(0.0, 0.45), n=st.sampled_from([1, 2, 3.5, float("inf")]),
    dim=st.sampled_from([0, 1, -1]), seed=seeds,
)  # fmt: skip
def test_structured_prunes_what_torch_prunes(
    rows: int, columns: int, amount: float, n: float, dim: int, seed: int
) -> None:
    ours, theirs = make_layers(rows, columns, seed), make_layers(rows, columns, seed)
    prune(ours, "ln_structured", amount, n=n, dim=dim)
    for layer in theirs:
        judge.ln_structured(layer, "weight", amount, n=n, dim=dim)
    for mine, mask in zip(ours, judged(theirs), strict=True):
        assert torch.equal(mask_of(mine), mask)


@given(rows=sizes, columns=sizes, amount=st.floats(0.0, 0.7), seed=seeds)
def test_random_prunes_as_many_as_torch_and_the_same_for_a_seed(
    rows: int, columns: int, amount: float, seed: int
) -> None:
    models = [make_layers(rows, columns, 0) for _ in range(3)]
    for model, own in zip(models, (seed, seed, seed + 1), strict=True):
        prune(model, "random", amount, seed=own)
    for layer in models[2]:
        expected = judge.RandomUnstructured(amount).compute_mask(layer.weight, torch.ones_like(layer.weight))
        assert (mask_of(layer) == 0).sum() == (expected == 0).sum()
    assert all(torch.equal(a, b) for a, b in zip(masks(models[0]).values(), masks(models[1]).values(), strict=True))


@given(rows=sizes, groups=st.integers(1, 5), pattern=st.sampled_from([(2, 4), (4, 8), (1, 3)]), seed=seeds)
def test_n_of_m_keeps_the_largest_of_each_m_inputs(rows: int, groups: int, pattern: tuple[int, int], seed: int) -> None:
    n, m = pattern
    torch.manual_seed(seed)
    layer = nn.Linear(groups * m, rows).double()
    before = layer.weight.detach().clone()
    prune(nn.Sequential(layer), "n:m", pattern=pattern)
    for row, original in zip(layer.weight.detach(), before, strict=True):
        for part, full in zip(row.split(m), original.split(m), strict=True):
            kept = sorted(full.tolist(), key=abs)[m - n :]
            assert sorted(part[part != 0].tolist(), key=abs) == kept


@given(seed=seeds, first=st.floats(0.05, 0.5), second=st.floats(0.05, 0.5))
def test_repeated_pruning_counts_as_told(seed: int, first: float, second: float) -> None:
    layer = nn.Linear(20, 15)
    torch.manual_seed(seed)
    nn.init.normal_(layer.weight)
    model = nn.Sequential(layer)
    prune(model, "random", first, seed=seed)
    early = mask_of(layer).clone()
    prune(model, "l1", second, of="remaining")
    zeros = round(first * 300) + round(second * (300 - round(first * 300)))
    assert sparsity(model).zeros == zeros
    assert not (mask_of(layer) & ~early).any(), "a pruned weight came back"
    prune(model, "l1", 0.9)
    prune(model, "l1", 0.9)
    assert sparsity(model).zeros == 270
    with pytest.raises(ValueError, match=r"amount=0.3 of the whole is less than the 0.9"):
        prune(model, "l1", 0.3)


def test_equal_magnitudes_go_in_their_order() -> None:
    model = nn.Sequential(nn.Linear(6, 2))
    nn.init.ones_(model[0].weight)
    prune(model, "l1", 0.25)
    assert mask_of(model[0]).flatten().tolist() == [False] * 3 + [True] * 9


def test_a_shared_weight_is_pruned_once_and_an_embedding_only_where_asked_for() -> None:
    def make() -> nn.ModuleDict:
        model = nn.ModuleDict({"embed": nn.Embedding(10, 4), "a": nn.Linear(4, 4), "b": nn.Linear(4, 4)})
        model["head"] = nn.Linear(4, 10, bias=False)
        model["head"].weight, model["b"].weight = model["embed"].weight, model["a"].weight
        return model

    report = prune(make(), "l1", 0.5)
    assert [layer.name for layer in report.layers] == ["a"]
    assert set(report.skipped) == {"b", "head"}
    assert "embedding" in report.skipped["head"]
    both = prune(make(), "l1", 0.5, kinds=("linear", "embedding"))
    assert [(layer.name, layer.zeros) for layer in both.layers] == [("embed", 20), ("a", 8)]
    assert both.of_parameters == 28 / both.parameters


def test_report_prints_each_layer_and_the_whole() -> None:
    model = make_layers(4, 6, 0)
    text = str(prune(model, "l1", 0.5, include=["1"]))
    assert "6 × 4" in text
    assert "50.00%" in text
    assert mask_of(model[0]) is None


def refusals() -> list[tuple[dict, str]]:
    return [
        ({"amount": 1.0}, r"amount=1.0 must be a number in \[0, 1\)"),
        ({"amount": -0.1}, r"amount=-0.1"),
        ({"amount": float("nan")}, "amount=nan"),
        ({"amount": None}, "amount=None"),
        ({"amount": True}, "amount=True"),
        ({"method": "l2", "amount": 0.5}, r"method='l2' must be one of l1, random, ln_structured, n:m"),
        ({"amount": 0.5, "dim": 1}, "dim=1 is no option of method='l1'"),
        ({"amount": 0.5, "scope": "all"}, "scope='all' must be one of"),
        ({"amount": 0.5, "of": "rest"}, "of='rest' must be one of"),
        ({"amount": 0.5, "include": ["qproj"]}, r"'qproj' matches no module; the nearest are block.q_proj"),
        ({"amount": 0.5, "exclude": ["blok.q_proj"]}, r"matches no module; the nearest are block.q_proj"),
        ({"amount": 0.5, "include": "q_proj"}, r"must be a sequence of patterns"),
        ({"amount": 0.5, "exclude": ["q_proj", "out"]}, "there is no layer of kinds="),
        ({"amount": 0.5, "kinds": ("matrix",)}, r"kinds=\['matrix'\] must be some of linear, conv, embedding"),
        ({"amount": 0.5, "include": ["packed"]}, r"packed cannot be pruned: Linear4bit holds quantized weights"),
        ({"method": "n:m"}, r"block.q_proj has 6 inputs, which are no multiple of m=4"),
        ({"method": "n:m", "pattern": (4, 2)}, r"pattern=\(4, 2\) must be"),
        ({"method": "n:m", "amount": 0.7}, r"amount=0.7 is not that of pattern=\(2, 4\), which is 0.5"),
        ({"method": "n:m", "kinds": ("conv",)}, r"conv has a weight of shape"),
        ({"method": "ln_structured", "amount": 0.5, "dim": 2}, "dim=2 is no dimension of block.q_proj"),
        ({"method": "ln_structured", "amount": 0.9}, "nothing would be left of out; exclude it"),
        ({"amount": 0.6, "scope": "global"}, "nothing would be left of out; .* or scope='layer'"),
    ]


@pytest.mark.parametrize(("options", "message"), refusals())
def test_bad_input_is_told_and_changes_nothing(options: dict, message: str) -> None:
    torch.manual_seed(0)
    model = nn.ModuleDict(
        {
            "block": nn.ModuleDict({"q_proj": nn.Linear(6, 8)}),
            "out": nn.Linear(8, 2),
            "conv": nn.Conv1d(4, 4, 2),
            "packed": Linear4bit.from_linear(nn.Linear(64, 4)),
        }
    )
    with torch.no_grad():
        model["out"].weight.mul_(1e-6)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=message):
        prune(model, **options)
    assert not masks(model)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_weights_that_are_not_finite_are_named() -> None:
    model = make_layers(3, 4, 0)
    with torch.no_grad():
        model[1].weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match="the weight of 1 holds NaN"):
        prune(model, "l1", 0.5)


def test_a_weight_that_torch_computes_is_left_alone_and_told() -> None:
    model = make_layers(3, 4, 0)
    judge.l1_unstructured(model[0], "weight", 0.5)
    report = prune(model, "l1", 0.5)
    assert "computed from others" in report.skipped["0"]
