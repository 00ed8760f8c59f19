"""The laws of sequence mixers, on every form of ours."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from neural_layers import EnhancedBlock, GroupedQueryAttention, LayerCache, Mamba, Mamba2, RotaryEmbedding
from neural_layers.testing import LAWS, check_mixer

DTYPES = st.sampled_from([torch.float64, torch.float32])
BIDIRECTIONAL = ["packed", "left_padding", "recomputed", "finite_differences", "save_load", "reference"]


@st.composite
def attentions(draw: st.DrawFn) -> nn.Module:
    kv_heads, group = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    torch.manual_seed(draw(st.integers(0, 99)))
    return GroupedQueryAttention(
        draw(st.sampled_from([8, 12])),
        kv_heads * group,
        kv_heads,
        draw(st.sampled_from([2, 4, 6])),
        position=draw(st.sampled_from(["rope", "alibi", None])),
        window=draw(st.sampled_from([None, 1, 3, 50])),
        qk_norm=draw(st.booleans()),
        gate=draw(st.booleans()),
        sinks=draw(st.booleans()),
        bias=draw(st.booleans()),
    )


@st.composite
def mambas(draw: st.DrawFn) -> nn.Module:
    torch.manual_seed(draw(st.integers(0, 99)))
    return Mamba(
        draw(st.sampled_from([4, 7])),
        state_dim=draw(st.integers(1, 5)),
        conv_width=draw(st.integers(1, 5)),
        expand=draw(st.integers(1, 2)),
        dt_rank=draw(st.sampled_from([None, 2])),
    )


@st.composite
def mamba2s(draw: st.DrawFn) -> nn.Module:
    torch.manual_seed(draw(st.integers(0, 99)))
    groups, head_dim = draw(st.integers(1, 2)), draw(st.integers(1, 3))
    return Mamba2(
        # Two heads or more to a group: D of a single one scales all that the norm sees, which undoes it, and what is
        # left of its gradient is rounding.
        groups * head_dim * 2,
        state_dim=draw(st.integers(1, 5)),
        head_dim=head_dim,
        num_groups=groups,
        conv_width=draw(st.integers(1, 5)),
        expand=draw(st.integers(1, 2)),
    )


@settings(max_examples=25)
@given(mixer=attentions(), dtype=DTYPES, length=st.integers(1, 11), seed=st.integers(0, 99))
def test_attention_obeys_all_laws(mixer, dtype, length, seed) -> None:
    report = check_mixer(mixer, dtype=dtype, length=length, seed=seed)
    assert report.passed, report


@settings(max_examples=15)
@given(mixer=mambas(), dtype=DTYPES, length=st.integers(1, 11), seed=st.integers(0, 99))
def test_mamba_obeys_all_laws(mixer, dtype, length, seed) -> None:
    report = check_mixer(mixer, dtype=dtype, length=length, seed=seed)
    assert report.passed, report


@settings(max_examples=15)
@given(mixer=mamba2s(), dtype=DTYPES, length=st.integers(1, 11), seed=st.integers(0, 99))
def test_mamba2_obeys_all_laws(mixer, dtype, length, seed) -> None:
    report = check_mixer(mixer, dtype=dtype, length=length, seed=seed)
    assert report.passed, report


@given(window=st.sampled_from([None, 1, 4]), position=st.sampled_from(["rope", "alibi"]), length=st.integers(1, 9))
def test_bidirectional_attention_obeys_the_laws_without_time(window, position, length) -> None:
    mixer = GroupedQueryAttention(8, 4, 2, position=position, window=window, causal=False)
    report = check_mixer(mixer, BIDIRECTIONAL, length=length)
    assert report.passed, report


def test_bidirectional_attention_is_found_not_causal() -> None:
    assert check_mixer(GroupedQueryAttention(8, 4, causal=False), ["causality"]).failed == ("causality",)


@pytest.mark.parametrize(
    "mixer",
    [
        EnhancedBlock(8, num_heads=4, num_kv_heads=2, layer_scale=0.5),
        EnhancedBlock(8, mixer=Mamba(8, 3), feed_forward=None),
        EnhancedBlock(8, mixer=Mamba2(8, 3, head_dim=4, num_groups=2)),
        GroupedQueryAttention(8, 2, position=RotaryEmbedding(4, scaling={"rope_type": "linear", "factor": 4.0})),
    ],
    ids=["attention block", "mamba block", "mamba2 block", "scaled rope"],
)
def test_blocks_obey_all_laws(mixer) -> None:
    report = check_mixer(mixer)
    assert report.passed, report


@pytest.mark.parametrize("window", [2, 5])
def test_windowed_cache_changes_nothing(window) -> None:
    mixer = GroupedQueryAttention(8, 4, window=window)
    laws = ["chunked", "packed_chunked", "padded_chunked", "state_gradient", "beam_reorder"]
    report = check_mixer(mixer, laws, length=12, make_cache=lambda: LayerCache(window))
    assert report.passed, report


@pytest.mark.parametrize("kind", ["full", "sliding", "linear", "linear of mamba2"])
def test_layers_of_transformers_caches_fit(kind) -> None:
    cache_utils = pytest.importorskip("transformers.cache_utils", reason="transformers is not installed")
    make = {
        "full": cache_utils.DynamicLayer,
        "sliding": lambda: cache_utils.DynamicSlidingWindowLayer(sliding_window=3),
        "linear": cache_utils.LinearAttentionLayer,
        "linear of mamba2": cache_utils.LinearAttentionLayer,
    }[kind]
    mixer = {
        "full": GroupedQueryAttention(8, 4, 2),
        "sliding": GroupedQueryAttention(8, 4, 2, window=3),
        "linear": Mamba(8, 3),
        "linear of mamba2": Mamba2(8, 3, head_dim=4),
    }[kind]
    with torch.no_grad():  # transformers' linear layer overwrites its state in place
        report = check_mixer(mixer, ["chunked", "packed_chunked", "padded_chunked", "beam_reorder"], make_cache=make)
    assert report.passed, report


def test_report_names_laws_and_errors() -> None:
    report = check_mixer(Mamba(4), ["causality", "save_load"])
    assert [r.law for r in report.results] == ["causality", "save_load"]
    assert "all laws hold" in str(report)
    assert "ok     causality" in str(report)


def test_what_a_mixer_raises_is_the_finding() -> None:
    report = check_mixer(nn.Linear(4, 4), "packed")
    assert report.failed == ("packed",)
    assert "TypeError" in report.results[0].raised


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"laws": "symmetry"}, f"no law 'symmetry'; there are {next(iter(LAWS))}"),
        ({"dtype": torch.float16}, "dtype=torch.float16 has no tolerance"),
        ({"length": 0}, "length=0 must be at least 1"),
    ],
)
def test_bad_arguments_are_named(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        check_mixer(Mamba(4), **arguments)
