"""Ranges measured on data: what each observer means, and data that does not serve."""

import numpy
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from neural_layers.wrappers.quantization import quantize
from neural_layers.wrappers.quantization.calibration import BINS, QUANTILE, InputHistogram, affine
from tests.wrappers.quantization.samples import inputs, outputs, tower


def values(seed: int, count: int, spread: float) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, generator=generator).exp() * spread - spread / 2


def histogram(*batches: torch.Tensor) -> InputHistogram:
    seen = InputHistogram()
    for batch in batches:
        seen.add(batch)
    return seen


@given(
    seed=st.integers(0, 99),
    counts=st.lists(st.integers(1, 300), min_size=1, max_size=4),
    spread=st.sampled_from([1e-3, 1, 77]),
)
def test_a_histogram_over_batches_is_that_of_all_values_at_once(seed, counts, spread) -> None:
    batches = [values(seed + i, count, spread * (i + 1)) for i, count in enumerate(counts)]
    together, parts = histogram(torch.cat(batches)), histogram(*batches)
    assert (parts.low, parts.high, parts.edge) == (together.low, together.high, together.edge)
    assert parts.counts.sum() == sum(counts)
    # A value on the border of two bins may count in either.
    assert (parts.counts.cumsum(0) - together.counts.cumsum(0)).abs().max() <= 1
    assert parts.edge / 2 < max(abs(parts.low), abs(parts.high)) <= parts.edge


@given(seed=st.integers(0, 99), spread=st.sampled_from([1e-3, 1, 77]))
def test_percentiles_are_numpys_to_a_bin(seed, spread) -> None:
    x = values(seed, 50_000, spread)
    seen = histogram(x)
    low, high = seen.quantile(QUANTILE)
    expected = numpy.quantile(x.double().numpy(), [(1 - QUANTILE) / 2, (1 + QUANTILE) / 2])
    # The outermost values lie apart, so the tails are compared by how many values lie outside.
    assert 0 < (x > high).sum() <= 4
    assert (x < low).sum() <= 4
    assert abs(low - expected[0]) <= 2 * seen.edge / BINS
    assert seen.low <= low < high <= seen.high


@given(seed=st.integers(0, 99), spread=st.sampled_from([1e-3, 1, 77]))
def test_the_range_of_least_error_is_at_most_as_wrong_as_the_whole(seed, spread) -> None:
    x = values(seed, 20_000, spread)
    seen = histogram(x)

    def error(low: float, high: float) -> float:
        scale, zero_point = affine(low, high)
        code = (x.double() / scale).round().add(zero_point).clamp(0, 255)
        return float((scale * (code - zero_point) - x.double()).square().mean())

    best = seen.least_error()
    assert error(*best) <= error(seen.low, seen.high) * 1.02
    assert best[0] / seen.low == pytest.approx(best[1] / seen.high)


@given(low=st.floats(-1e3, 1e3), span=st.floats(1e-3, 1e3))
def test_scale_and_zero_point_are_torchaos(low, span) -> None:
    primitives = pytest.importorskip("torchao.quantization.quant_primitives", reason="torchao is the judge here")
    high = low + span
    scale, zero_point = affine(low, high)
    extremes = torch.tensor([[low, high]], dtype=torch.float32)
    theirs = primitives.choose_qparams_affine(
        extremes, primitives.MappingType.ASYMMETRIC, (1, 2), torch.uint8, 0, 255, eps=1e-30, scale_dtype=torch.float32
    )
    assert scale == pytest.approx(float(theirs[0]), rel=1e-6)
    assert abs(zero_point - int(theirs[1])) <= (abs(-min(low, 0) / scale % 1 - 0.5) < 1e-3)
    # Zero has a code of its own.
    assert (round(0 / scale) + zero_point - zero_point) * scale == 0


@pytest.mark.parametrize("observer", ["minmax", "percentile", "mse"])
def test_ranges_come_from_all_batches_and_the_model_is_left_as_it_was(observer) -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 64), nn.Dropout(0.5), nn.Linear(64, 64)).train()
    batches = [torch.randn(50, 64), 3 * torch.randn(50, 64)]
    with torch.no_grad():
        second = model[0](torch.cat(batches))
    quantize(model, "int8_static", calibration=iter(batches), observer=observer)
    assert model.training
    assert model[1].training
    assert not model[0]._forward_pre_hooks
    for layer, seen in ((model[0], torch.cat(batches)), (model[2], second)):
        range_ = 255 * float(layer.input_scale)
        whole = float(seen.max() - seen.min())
        assert (
            range_ == pytest.approx(whole, rel=1e-5) if observer == "minmax" else 0.3 * whole < range_ <= whole * 1.001
        )


def test_outliers_hurt_minmax_and_not_the_others() -> None:
    torch.manual_seed(0)
    x = torch.randn(4000, 64)
    # Rarer than one value in 20,000, and each 50 times as large.
    x[::400, 0] = 50.0
    linear = nn.Sequential(nn.Linear(64, 64))
    exact = linear(x[1:400]).detach()
    errors = {}
    for observer in ("minmax", "percentile", "mse"):
        model = nn.Sequential(nn.Linear(64, 64))
        model.load_state_dict(linear.state_dict())
        quantize(model, "int8_static", calibration=[x], observer=observer)
        errors[observer] = float((model(x[1:400]).detach() - exact).norm())
    assert errors["percentile"] < errors["minmax"] / 3
    assert errors["mse"] < errors["minmax"]


def test_batches_are_dicts_tuples_or_tensors() -> None:
    ids = inputs(tower())["ids"]
    made = []
    for batch in ({"ids": ids}, (ids,), [ids], ids):
        model = tower()
        quantize(model, "int8_static", calibration=[batch])
        made.append(outputs(model))
    assert all(torch.equal(made[0], other) for other in made[1:])


class Partial(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.used, self.unused = nn.Linear(64, 64), nn.Linear(64, 64)

    def forward(self, x):
        return self.used(input=x)


@pytest.mark.parametrize(
    ("batches", "message"),
    [
        ([], "calibration has no batch"),
        (iter(()), "calibration has no batch"),
        ([torch.ones(2, 63)], r"calibration batch 0 \(\(2, 63\) float32 on cpu\): the model refuses it"),
        ([torch.ones(2, 64), {"x": torch.ones(3)}], r"calibration batch 1 \(x \(3,\) float32 on cpu\)"),
        ([torch.ones(2, 64)], "never reached unused; give batches that use them, or exclude them"),
        ([torch.full((2, 64), torch.inf)], "used: its input holds NaN or infinity"),
        ([torch.ones(2, 64, device="meta")], "meta"),
        (torch.ones(2, 64), r"calibration is one Tensor; give an iterable of batches, such as \[calibration\]"),
        ({"x": torch.ones(2, 64)}, "calibration is one dict"),
        (3, "calibration is a int; give an iterable"),
        (["text"], r"calibration batch 0 \(str\)"),
    ],
)
def test_data_that_does_not_serve_is_told_and_nothing_changes(batches, message) -> None:
    model = Partial()
    with pytest.raises(ValueError, match=message):
        quantize(model, "int8_static", calibration=batches)
    assert type(model.used) is nn.Linear
    assert not model.used._forward_pre_hooks
    quantize(model, "int8_static", calibration=[torch.ones(2, 64)], exclude="unused")


def test_data_that_breaks_off_leaves_the_model_as_it_was() -> None:
    def batches():
        yield torch.ones(2, 64)
        raise OSError("the disk is gone")

    model = Partial().train()
    model.unused.eval()
    with pytest.raises(OSError, match="the disk is gone"):
        quantize(model, "int8_static", calibration=batches(), exclude="unused")
    assert type(model.used) is nn.Linear
    assert (model.training, model.used.training, model.unused.training) == (True, True, False)
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_an_input_of_zeros_has_a_range() -> None:
    model = nn.Sequential(nn.Linear(64, 64))
    quantize(model, "int8_static", calibration=[torch.zeros(2, 64)])
    assert torch.equal(model(torch.zeros(1, 64))[0], model[0].bias)
