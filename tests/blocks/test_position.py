"""Rotary tables and ALiBi slopes, judged by transformers and by the papers."""

import pytest
import torch

from neural_layers import RotaryEmbedding, alibi_slopes

SCALINGS = {
    "default": None,
    "linear": {"rope_type": "linear", "factor": 4.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0, "original_max_position_embeddings": 32},
    "yarn": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64},
    "llama3": {
        "rope_type": "llama3",
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
}


def transformers_table(scaling, head_dim, length):
    rope_utils = pytest.importorskip("transformers.modeling_rope_utils", reason="transformers is not installed")
    from transformers import LlamaConfig

    parameters = {"rope_theta": 10000.0, **(scaling or {"rope_type": "default"})}
    config = LlamaConfig(
        hidden_size=head_dim * 2, num_attention_heads=2, max_position_embeddings=64, rope_parameters=parameters
    )
    if scaling is None:
        frequency, factor = 10000.0 ** -(torch.arange(0, head_dim, 2).double() / head_dim), 1.0
    else:
        if scaling["rope_type"] == "dynamic":
            config.max_position_embeddings = scaling["original_max_position_embeddings"]
        init = rope_utils.ROPE_INIT_FUNCTIONS[scaling["rope_type"]]
        frequency, factor = init(config, torch.device("cpu"), seq_len=length)
    angle = torch.arange(length).double().unsqueeze(1) * frequency.double()
    return angle.cos() * factor, angle.sin() * factor


@pytest.mark.parametrize("length", [1, 31, 100])
@pytest.mark.parametrize("name", SCALINGS)
def test_tables_agree_with_transformers(name, length) -> None:
    cos, sin = RotaryEmbedding(16, scaling=SCALINGS[name])(torch.arange(length), torch.float64)
    expected_cos, expected_sin = transformers_table(SCALINGS[name], 16, length)
    # transformers keeps its frequencies in float32: an angle of 100 is good to 1e-5.
    torch.testing.assert_close(cos, expected_cos, atol=2e-5, rtol=0)
    torch.testing.assert_close(sin, expected_sin, atol=2e-5, rtol=0)


def test_far_positions_keep_their_digits_in_float32() -> None:
    cos, _ = RotaryEmbedding(8)(torch.tensor([1_000_003]))
    expected = torch.tensor(1_000_003.0, dtype=torch.float64).cos()
    assert abs(cos[0, 0].item() - expected.item()) < 1e-7


def test_positions_may_differ_by_row_and_be_none() -> None:
    rotary = RotaryEmbedding(8, scaling=SCALINGS["dynamic"])
    assert rotary(torch.tensor([[0, 1, 2], [5, 6, 7]]))[0].shape == (2, 3, 4)
    assert rotary(torch.empty(0, dtype=torch.long))[0].shape == (0, 4)


def test_nothing_is_lost_when_built_on_the_meta_device() -> None:
    with torch.device("meta"):
        rotary = RotaryEmbedding(8)
    assert not list(rotary.state_dict())
    assert rotary(torch.arange(3))[0].isfinite().all()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"head_dim": 7}, "head_dim=7 must be even"),
        (
            {"head_dim": 2, "scaling": {"rope_type": "dynamic", "factor": 2, "original_max_position_embeddings": 8}},
            "head_dim=2 must be at least 4",
        ),
        ({"head_dim": 8, "scaling": {"rope_type": "ntk"}}, "rope_type='ntk'; known are linear, dynamic, yarn, llama3"),
        ({"head_dim": 8, "scaling": {"rope_type": "yarn", "factor": 2}}, "lacks original_max_position_embeddings"),
        ({"head_dim": 8, "scaling": {"rope_type": "linear", "factor": 2, "beta": 1}}, "does not know beta"),
    ],
)
def test_bad_rotary_arguments_are_named(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        RotaryEmbedding(**arguments)


def test_alibi_slopes_of_powers_of_two_are_a_geometric_series() -> None:
    torch.testing.assert_close(alibi_slopes(8), 2.0 ** -torch.arange(1.0, 9.0))
    torch.testing.assert_close(alibi_slopes(1), torch.tensor([2.0**-8]))


@pytest.mark.parametrize("heads", [3, 6, 12, 20])
def test_alibi_slopes_of_other_counts_agree_with_transformers(heads) -> None:
    bloom = pytest.importorskip("transformers.models.bloom.modeling_bloom", reason="transformers is not installed")
    # With a mask of one past token, Bloom's bias at the second position is the slope.
    bias = bloom.build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)
    torch.testing.assert_close(alibi_slopes(heads), bias[:, 0, 1])


def test_no_heads_are_refused() -> None:
    with pytest.raises(ValueError, match="num_heads=0 must be at least 1"):
        alibi_slopes(0)
