"""Wrappers in any order: whatever is done to a model that should not change its outputs does not."""

import copy
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from neural_layers.wrappers.modules import tensor_bytes
from neural_layers.wrappers.quantization import Plan, convert_qat, load_quantized, quantize, save_quantized
from tests.wrappers.quantization.samples import SCHEMES, Tower, cvm, hybrid, inputs, outputs, quantized, tower

PARTS = {"first": ["first.0", "first.2"], "tied": ["embed", "head"]}


def apply_scheme(model: Tower, part: str, scheme: str) -> None:
    calibration = [inputs(model)] if scheme == "int8_static" else None
    quantize(model, scheme, include=PARTS[part], calibration=calibration)


def saved(model: Tower) -> Tower:
    """Through a folder, into a fresh model."""
    with tempfile.TemporaryDirectory() as folder:
        return load_quantized(save_quantized(model, Path(folder) / "model"), tower(seed=1))


def replayed(model: Tower) -> Tower:
    """By the plan and the state dict."""
    fresh = tower(seed=1)
    plan = Plan.from_json(Plan.of(model).to_json())
    static = any(entry["scheme"] == "int8_static" for entry in plan.layers.values())
    quantize(fresh, plan, calibration=[inputs(fresh)] if static else None)
    fresh.load_state_dict(model.state_dict())
    return fresh


def cast(model: Tower) -> Tower:
    """To float64 and back, which no float32 notices, and no bit."""
    return model.double().float()


KEEPING = {
    "save": saved,
    "deepcopy": copy.deepcopy,
    "replay": replayed,
    "cast": cast,
    "move": lambda model: model.to("cpu"),
    "state": lambda model: (model.load_state_dict(model.state_dict()), model)[1],
    "assign": lambda model: (model.load_state_dict(copy.deepcopy(model.state_dict()), assign=True), model)[1],
    "train and back": lambda model: model.train().eval(),
}


@settings(max_examples=25)
@given(
    first=st.tuples(st.sampled_from(list(PARTS)), st.sampled_from(SCHEMES)),
    second=st.sampled_from(SCHEMES),
    between=st.lists(st.sampled_from(list(KEEPING)), max_size=3),
    after=st.lists(st.sampled_from(list(KEEPING)), max_size=3),
)
def test_no_step_but_quantizing_changes_the_outputs(first, second, between, after) -> None:
    model, (part, scheme) = tower(), first
    other = next(name for name in PARTS if name != part)
    apply_scheme(model, part, scheme)
    for steps, next_scheme in ((between, second), (after, None)):
        expected, plan, size = outputs(model), Plan.of(model), tensor_bytes(model)
        for step in steps:
            if step == "assign" and "head" not in plan.layers:
                continue  # of plain layers, torch's own `assign` makes two weights of a tied one
            model = KEEPING[step](model)
            assert torch.equal(outputs(model), expected), step
            assert Plan.of(model) == plan, step
            assert tensor_bytes(model) == size, step
            assert model.head.weight is model.embed.weight, step
            assert model.again is model.first, step
        if next_scheme is not None:
            apply_scheme(model, other, next_scheme)
    with pytest.raises(ValueError, match="already"):
        quantize(model, scheme if scheme != "int8_static" else "nf4")


@settings(max_examples=10)
@given(seed=st.integers(0, 99), steps=st.lists(st.sampled_from(["deepcopy", "cast", "move", "state"]), max_size=4))
def test_what_was_prepared_for_training_is_converted_from_anywhere(seed, steps) -> None:
    model = tower(seed)
    quantize(model, "int8_qat")
    expected = outputs(model)
    for step in steps:
        model = KEEPING[step](model)
        assert torch.equal(outputs(model), expected), step
    convert_qat(model)
    assert torch.equal(outputs(model), expected)
    assert torch.equal(outputs(saved(model)), expected)


@settings(max_examples=6)
@given(
    make=st.sampled_from([hybrid, cvm]),
    scheme=st.sampled_from(SCHEMES),
    steps=st.lists(st.sampled_from(["pretrained", "deepcopy", "cast", "tie"]), min_size=1, max_size=3),
)
def test_models_of_the_library_keep_their_outputs_too(make, scheme, steps) -> None:
    model = quantized(make(), scheme)
    expected, size = outputs(model), tensor_bytes(model)
    for step in steps:
        if step == "pretrained":
            with tempfile.TemporaryDirectory() as folder:
                model.save_pretrained(folder)
                model = type(model).from_pretrained(folder)
        elif step == "tie":
            model.tie_weights()
        else:
            model = KEEPING[step](model)
        assert torch.equal(outputs(model), expected), step
        assert tensor_bytes(model) == size, step
