"""Mamba2 beside transformers' mixer, its start, and what it refuses."""

import pytest
import torch
from torch import nn

from neural_layers import LayerCache, Mamba2
from neural_layers.mamba2 import GroupedRMSNorm
from tests.op_checks import relative_error, seeded
from tests.tolerances import FORWARD, GRADIENT

TRANSFORMERS = "transformers.models.mamba2"


def randn(*shape: int) -> torch.Tensor:
    return seeded(0)(*shape).float()


def make_config(groups: int):
    module = pytest.importorskip(f"{TRANSFORMERS}.configuration_mamba2", reason="transformers is not installed")
    sizes = {"hidden_size": 16, "num_heads": 4, "head_dim": 8, "state_size": 5, "num_hidden_layers": 1}
    return module.Mamba2Config(**sizes, n_groups=groups, chunk_size=16)


def make_pair(groups: int) -> tuple[Mamba2, nn.Module]:
    """Ours and that of transformers, with the same weights."""
    modeling = pytest.importorskip(f"{TRANSFORMERS}.modeling_mamba2", reason="transformers is not installed")
    torch.manual_seed(groups)
    theirs = modeling.Mamba2Mixer(make_config(groups), layer_idx=0)
    ours = Mamba2(16, 5, head_dim=8, num_groups=groups)
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


@pytest.mark.parametrize("length", [1, 7, 100])
@pytest.mark.parametrize("groups", [1, 2])
def test_mamba2_is_that_of_transformers_with_its_weights(groups, length) -> None:
    ours, theirs = make_pair(groups)
    x = randn(2, length, 16).requires_grad_()
    outputs = [mixer(x) for mixer in (ours, theirs)]
    assert relative_error(*outputs) <= FORWARD[torch.float32]
    names = [name for name, _ in ours.named_parameters()]
    named = [[x, *(mixer.get_parameter(name) for name in names)] for mixer in (ours, theirs)]
    weight = torch.randn_like(outputs[0])
    grads = [torch.autograd.grad((y * weight).sum(), leaves) for y, leaves in zip(outputs, named, strict=True)]
    for actual, expected in zip(*grads, strict=True):
        assert relative_error(actual, expected) <= GRADIENT[torch.float32]


@torch.no_grad()
def test_state_in_the_cache_is_that_of_transformers() -> None:
    ours, theirs = make_pair(2)
    cache_utils = pytest.importorskip("transformers.cache_utils", reason="transformers is not installed")
    x, cache, their_cache = randn(2, 9, 16), LayerCache(), cache_utils.DynamicCache(config=make_config(2))
    ours(x, cache=cache)
    theirs(x, cache_params=their_cache)
    state, expected = cache.recurrent_states[0], their_cache.layers[0].recurrent_states[0]
    assert state.shape == expected.shape == (2, 4, 8, 5)
    assert relative_error(state, expected) <= FORWARD[torch.float32]


@pytest.mark.parametrize("pads", [1, 5])
def test_left_padding_is_masked_as_in_transformers(pads) -> None:
    ours, theirs = make_pair(2)
    x, mask = randn(2, 9, 16), torch.ones(2, 9, dtype=torch.long)
    mask[1, :pads] = 0
    actual, expected = ours(x, attention_mask=mask), theirs(x, attention_mask=mask)
    assert relative_error(actual[mask.bool()], expected[mask.bool()]) <= FORWARD[torch.float32]


def test_recurrence_starts_as_published() -> None:
    torch.manual_seed(0)
    mixer = Mamba2(256, head_dim=2)
    A, step = mixer.A_log.exp(), nn.functional.softplus(mixer.dt_bias)
    assert 1 <= A.min() < 2
    assert 15 < A.max() <= 16
    assert 1e-3 * 0.99 <= step.min() < 2e-3
    assert 0.05 < step.max() <= 0.1 * 1.01
    assert mixer.D.eq(1).all()
    assert Mamba2(64).in_proj.weight.shape == (2 * 128 + 2 * 128 + 2, 64)


def test_grouped_norm_normalises_each_group_by_itself() -> None:
    norm, x = GroupedRMSNorm(6, num_groups=2, eps=0.0), randn(3, 4, 6)
    with torch.no_grad():
        norm.weight.copy_(torch.arange(1.0, 7.0))
    parts = [part / part.square().mean(-1, keepdim=True).sqrt() for part in x.chunk(2, dim=-1)]
    torch.testing.assert_close(norm(x), torch.cat(parts, dim=-1) * norm.weight)
    assert norm(x.bfloat16()).dtype == torch.float32  # the weight's
    assert norm.bfloat16()(x.bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_mamba2_runs_in_every_dtype(dtype) -> None:
    mixer = Mamba2(8, 4, head_dim=4, num_groups=2).to(dtype)
    cache = LayerCache()
    out = mixer(randn(1, 5, 8).to(dtype), cache=cache)
    assert out.dtype == dtype
    assert cache.recurrent_states[0].dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    out.sum().backward()
    assert all(p.grad.isfinite().all() for p in mixer.parameters())


def test_mamba2_is_traced_and_exported_without_graph_breaks() -> None:
    mixer, x = Mamba2(8, 3, head_dim=4), randn(2, 6, 8)
    torch._dynamo.reset()
    compiled = torch.compile(mixer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), mixer(x))
    torch.testing.assert_close(compiled(randn(2, 9, 8)), mixer(randn(2, 9, 8)))
    exported = torch.export.export(mixer, (x,), dynamic_shapes=({1: torch.export.Dim("T", min=2, max=999)},))
    for length in (2, 4, 11, 33, 150):
        torch.testing.assert_close(exported.module()(randn(2, length, 8)), mixer(randn(2, length, 8)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dim": 8, "head_dim": 5}, r"expand \* dim = 16 must be a multiple of head_dim=5"),
        ({"dim": 8, "head_dim": 4, "num_groups": 3}, "= 4 heads must be a multiple of num_groups=3"),
    ],
)
def test_widths_that_do_not_divide_are_named(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        Mamba2(**arguments)


def test_masks_that_do_not_cover_the_tokens_are_named() -> None:
    mixer, x = Mamba2(8, 3, head_dim=4), randn(2, 5, 8)
    with pytest.raises(ValueError, match=r"attention_mask has shape \(2, 4\); expected \(B, T\) = \(2, 5\)"):
        mixer(x, attention_mask=torch.ones(2, 4))
    cache = LayerCache()
    mixer(x, cache=cache)
    with pytest.raises(ValueError, match=r"seq_idx has shape \(2, 5\); with a filled cache"):
        mixer(x, cache=cache, seq_idx=torch.zeros(2, 5, dtype=torch.long))
