"""EnhancedBlock and the small parts."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from neural_layers import (
    AttentionPooling,
    CrossAttention,
    EnhancedBlock,
    GeGLU,
    GeMPooling,
    GroupedQueryAttention,
    LayerCache,
    LayerScale,
    Mamba,
    PostNormResidual,
    RMSNorm,
    StochasticDepth,
    SwiGLU,
)


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_the_default_block_is_attention_and_swiglu() -> None:
    block = EnhancedBlock(dim=64, num_heads=4, num_kv_heads=2)
    assert block(randn(2, 7, 64)).shape == (2, 7, 64)
    assert isinstance(block.mixer.inner, GroupedQueryAttention)
    assert block.mixer.inner.num_kv_heads == 2
    assert isinstance(block.feed_forward.inner, SwiGLU)
    assert block.cross_attention is None


def test_a_block_is_its_formula() -> None:
    block = EnhancedBlock(16, num_heads=2, layer_scale=0.5)
    x = randn(2, 5, 16)
    h = x + 0.5 * block.mixer.inner(block.mixer.norm(x))
    expected = h + 0.5 * block.feed_forward.inner(block.feed_forward.norm(h))
    torch.testing.assert_close(block(x), expected)


def test_a_slot_given_as_none_is_absent() -> None:
    block = EnhancedBlock(8, mixer=Mamba(8), feed_forward=None)
    x = randn(1, 4, 8)
    assert block.feed_forward is None
    torch.testing.assert_close(block(x), x + block.mixer.inner(block.mixer.norm(x)))
    torch.testing.assert_close(EnhancedBlock(8, mixer=None, feed_forward=None)(x), x)


def test_post_norm_normalises_the_sum() -> None:
    block = EnhancedBlock(8, num_heads=2, feed_forward=None, residual=PostNormResidual)
    x = randn(1, 4, 8)
    torch.testing.assert_close(block(x), block.mixer.norm(x + block.mixer.inner(x)))


def test_any_built_part_fits_its_slot() -> None:
    x = randn(1, 4, 8)
    plain = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
    for feed_forward in (GeGLU(8, 12), plain):
        assert EnhancedBlock(8, num_heads=2, feed_forward=feed_forward)(x).shape == x.shape


def test_cross_attention_reads_the_context_once_into_its_cache() -> None:
    block = EnhancedBlock(8, num_heads=2, cross_attention=CrossAttention(8, 2, context_dim=6), layer_scale=0.1).eval()
    x, context, mask = randn(2, 5, 8), randn(2, 3, 6, seed=1), torch.tensor([[1, 1, 1], [1, 0, 0]])
    whole = block(x, context=context, context_mask=mask)
    cache, cross_cache = LayerCache(), LayerCache()
    first = block(x[:, :2], context=context, context_mask=mask, cache=cache, cross_cache=cross_cache)
    rest = block(x[:, 2:], context_mask=mask, cache=cache, cross_cache=cross_cache)
    torch.testing.assert_close(torch.cat([first, rest], dim=1), whole)
    # Masked context changes nothing.
    torch.testing.assert_close(block(x, context=context + 9 * (1 - mask).unsqueeze(-1), context_mask=mask), whole)


def test_a_row_without_context_gets_nothing_from_it() -> None:
    attention = CrossAttention(8, 2)
    mask = torch.tensor([[True, True], [False, False]])
    out = attention(randn(2, 3, 8), randn(2, 2, 8, seed=1), context_mask=mask)
    assert out[1].abs().max() == 0
    assert out[0].abs().max() > 0


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: EnhancedBlock(8), "needs num_heads"),
        (lambda: EnhancedBlock(8, num_heads=2, mixer=Mamba(8)), "num_heads=2.*leave them out"),
        (lambda: GroupedQueryAttention(8, 4, 3), "num_heads=4 must be a positive multiple of num_kv_heads=3"),
        (lambda: GroupedQueryAttention(9, 4), "dim=9 must be a multiple of num_heads=4"),
        (lambda: GroupedQueryAttention(8, 4, position="sin"), "position='sin' must be 'rope', 'alibi'"),
        (lambda: GroupedQueryAttention(8, 4, window=0), "window=0 must be at least 1"),
        (lambda: GroupedQueryAttention(8, 4, dropout=1.5), r"dropout=1.5 must lie in \[0, 1\)"),
        (lambda: SwiGLU(8, 0), "hidden_dim=0 must be at least 1"),
        (lambda: AttentionPooling(8, 0), "num_heads=0"),
        (lambda: EnhancedBlock(8, mixer=None)(randn(1, 2, 8), cache=LayerCache()), "need a mixer"),
        (lambda: StochasticDepth(1.0), r"p=1.0 must lie in \[0, 1\)"),
        (lambda: EnhancedBlock(8, num_heads=2, drop_path=-0.1), "p=-0.1"),
        (lambda: AttentionPooling(9, 2), "dim=9 must be a multiple of num_heads=2"),
        (lambda: GeMPooling(p=0.0), "p=0.0 and eps=1e-06 must be positive"),
        (lambda: EnhancedBlock(8, num_heads=2)(randn(1, 2, 8), context=randn(1, 2, 8)), "need cross_attention="),
        (lambda: CrossAttention(8, 2)(randn(1, 2, 8)), "needs `context`"),
        (lambda: GeMPooling()(randn(2, 3, 4), torch.ones(2, 4)), r"mask has shape \(2, 4\)"),
    ],
)
def test_bad_arguments_are_named(make, message) -> None:
    with pytest.raises(ValueError, match=message):
        make()


def test_an_unknown_keyword_raises() -> None:
    with pytest.raises(TypeError, match="use_cache"):
        EnhancedBlock(8, num_heads=2)(randn(1, 2, 8), use_cache=True)


def test_norm_agrees_with_torch() -> None:
    ours, theirs = RMSNorm(8, eps=1e-5), nn.RMSNorm(8, eps=1e-5)
    torch.testing.assert_close(ours(randn(3, 8)), theirs(randn(3, 8)))


@pytest.mark.parametrize("layer", [SwiGLU, GeGLU])
def test_feed_forward_is_its_formula(layer) -> None:
    ff, x = layer(8), randn(2, 8)
    assert ff.gate_proj.out_features == 64
    act = nn.functional.silu if layer is SwiGLU else lambda v: nn.functional.gelu(v, approximate="tanh")
    torch.testing.assert_close(ff(x), ff.down_proj(act(ff.gate_proj(x)) * ff.up_proj(x)))


def test_layer_scale_begins_small() -> None:
    torch.testing.assert_close(LayerScale(4)(torch.ones(2, 4)), torch.full((2, 4), 1e-5))


def test_stochastic_depth_drops_whole_samples_and_keeps_the_mean() -> None:
    torch.manual_seed(0)
    drop = StochasticDepth(0.25)
    out = drop(torch.ones(4000, 3))
    torch.testing.assert_close(out.unique(), torch.tensor([0.0, 4 / 3]))
    assert (out.amin(dim=1) == out.amax(dim=1)).all()
    assert out.mean().item() == pytest.approx(1.0, abs=0.04)
    assert drop.eval()(out) is out


@given(length=st.integers(1, 6), pad=st.integers(0, 4), queries=st.integers(1, 3), seed=st.integers(0, 99))
def test_pools_do_not_see_padding(length, pad, queries, seed) -> None:
    torch.manual_seed(seed)
    x, garbage = randn(2, length, 8, seed=seed), torch.full((2, pad, 8), float("nan"))
    mask = torch.cat([torch.ones(2, length), torch.zeros(2, pad)], dim=1)
    gem = GeMPooling()
    torch.testing.assert_close(gem(torch.cat([x, garbage], dim=1), mask), gem(x))
    pool = AttentionPooling(8, 2, queries)
    padded = torch.cat([x, torch.full((2, pad, 8), 1e4)], dim=1)
    torch.testing.assert_close(pool(padded, mask), pool(x))
    assert pool(x).shape == ((2, 8) if queries == 1 else (2, queries, 8))


def test_gem_lies_between_mean_and_maximum() -> None:
    x = randn(2, 50, 4).abs() + 0.1
    torch.testing.assert_close(GeMPooling(p=1.0)(x), x.mean(dim=1))
    torch.testing.assert_close(GeMPooling(p=300.0)(x), x.amax(dim=1), rtol=0.02, atol=0)


def test_gem_gradients_match_finite_differences_also_for_p_and_empty_rows() -> None:
    pool = GeMPooling().double()
    x = randn(2, 3, 2).double().requires_grad_()
    mask = torch.tensor([[1, 1, 0], [0, 0, 0]])
    p = pool.p.detach().clone().requires_grad_()
    call = lambda x, p: torch.func.functional_call(pool, {"p": p}, (x, mask))  # noqa: E731
    assert call(x, p).isfinite().all()
    assert torch.autograd.gradcheck(call, (x, p))


def test_attention_pooling_of_an_empty_row_is_zero() -> None:
    out = AttentionPooling(8, 2)(randn(2, 3, 8), torch.tensor([[1, 0, 0], [0, 0, 0]]))
    assert out[1].abs().max() == 0


def test_mamba_recurrence_starts_as_published() -> None:
    mamba = Mamba(16, state_dim=4)
    torch.testing.assert_close(mamba.A_log.exp(), torch.arange(1.0, 5.0).expand(32, 4))
    step = nn.functional.softplus(mamba.dt_proj.bias)
    assert step.min() >= 1e-3 * 0.99
    assert step.max() <= 0.1 * 1.01
    assert mamba.D.eq(1).all()


@pytest.mark.parametrize("mixer", ["attention", "mamba"])
def test_blocks_are_traced_and_exported_without_graph_breaks(mixer) -> None:
    part = Mamba(8, 3) if mixer == "mamba" else GroupedQueryAttention(8, 4, 2, window=3, qk_norm=True)
    block, x = EnhancedBlock(8, mixer=part), randn(2, 6, 8)
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), block(x))
    torch.testing.assert_close(compiled(randn(2, 9, 8)), block(randn(2, 9, 8)))
    exported = torch.export.export(block, (x,), dynamic_shapes=({1: torch.export.Dim("T", min=2, max=999)},))
    for length in (2, 4, 11, 33, 150):
        torch.testing.assert_close(exported.module()(randn(2, length, 8)), block(randn(2, length, 8)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_blocks_run_in_every_dtype(dtype) -> None:
    for mixer in (GroupedQueryAttention(8, 2, sinks=True, gate=True), Mamba(8)):
        block = EnhancedBlock(8, mixer=mixer).to(dtype)
        out = block(randn(1, 5, 8).to(dtype))
        assert out.dtype == dtype
        out.sum().backward()
        assert all(p.grad.isfinite().all() for p in block.parameters())
