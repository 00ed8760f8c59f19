"""The questions that all wrappers ask of a model."""

import pytest
import torch
from torch import nn

from neural_layers.wrappers import modules
from neural_layers.wrappers.modules import matches, nearest, read_by_others, replace_module, tensor_bytes, tied


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 3)
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(3, 5), nn.Linear(5, 3)), nn.ReLU()])
        self.again = self.layers[0]
        self.head = nn.Linear(3, 7, bias=False)
        self.head.weight = self.embed.weight


@pytest.mark.parametrize(
    ("pattern", "fits"),
    [
        ("model.layers.0.q_proj", True),
        ("q_proj", True),
        ("0.q_proj", True),
        ("proj", False),
        ("model", False),
        ("model.*.q_proj", True),
        ("layers.*.q_proj", False),
        ("model.layers.[01].q_proj", True),
        (r"re:model\.layers\.\d\.[qk]_proj", True),
        ("re:q_proj", False),
    ],
)
def test_a_pattern_is_a_name_its_end_a_glob_or_an_expression(pattern, fits) -> None:
    assert matches("model.layers.0.q_proj", pattern) is fits


def test_an_expression_that_is_none_is_told() -> None:
    with pytest.raises(ValueError, match="pattern 're:\\(' is not a regular expression"):
        matches("a", "re:(")


def test_modules_in_containers_are_replaced_by_index() -> None:
    model, new = Tied(), nn.Identity()
    replace_module(model, "layers.0.1", new)
    assert model.layers[0][1] is new
    replace_module(model, "layers.1", new)
    assert model.layers[1] is new
    with pytest.raises(ValueError, match="name is empty"):
        replace_module(model, "", new)
    with pytest.raises(ValueError, match="'layers.0.7' matches no module; the nearest are .*layers.0.1"):
        replace_module(model, "layers.0.7", new)


def test_the_nearest_names_compare_as_many_parts_as_are_asked_for() -> None:
    names = ["model.0.q_proj", "model.1.q_proj", "model.0.k_proj", "model.0.in_proj", "head"]
    assert nearest("qproj", names)[0] == "model.0.q_proj"
    assert nearest("0.kproj", names)[0] == "model.0.k_proj"
    assert "model.1.q_proj" not in nearest("q_prj", names)
    assert nearest("ZZZZ", names) == []


def test_holders_of_a_shared_parameter_are_found_under_every_name() -> None:
    model = Tied()
    found = tied(model)
    assert found[id(model.embed.weight)] == ["embed", "head"]
    assert found[id(model.again[0].weight)] == ["layers.0.0", "again.0"]
    assert tied(nn.Linear(2, 2)) == {}


def test_projections_that_torchs_attention_reads_are_found() -> None:
    model = nn.ModuleDict({"own": nn.Linear(4, 4), "layer": nn.TransformerEncoderLayer(4, 2, 8)})
    assert {"layer.linear1", "layer.self_attn.out_proj"} <= read_by_others(model)
    assert "own" not in read_by_others(model)
    assert "out_proj" in read_by_others(nn.MultiheadAttention(4, 2))


def test_shared_memory_counts_once() -> None:
    model = Tied()
    shared = model.embed.weight.numel()
    inner = sum(parameter.numel() for parameter in model.again.parameters())
    assert tensor_bytes(model) == 4 * (shared + inner)
    model.register_buffer("table", torch.zeros(10, dtype=torch.int8), persistent=False)
    model.register_buffer("view", model.table[2:5])
    assert tensor_bytes(model) == 4 * (shared + inner) + 10
    model.register_buffer("part", torch.zeros(100)[3:5])
    assert tensor_bytes(model) == 4 * (shared + inner) + 10 + 8
    with torch.device("meta"):
        assert tensor_bytes(Tied()) == 4 * (shared + inner)


def test_names_of_the_wrappers_are_known_before_they_load() -> None:
    from neural_layers import wrappers

    assert {"apply_lora", "prune", "quantize"} <= set(dir(wrappers))
    assert modules.__name__.startswith(wrappers.__name__)
    with pytest.raises(AttributeError, match="no attribute 'quantise'"):
        getattr(wrappers, "quantise")  # noqa: B009  (the attribute is what is asked for)
