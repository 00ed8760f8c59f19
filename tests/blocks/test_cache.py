"""LayerCache: what mixers' laws do not reach."""

import pytest
import torch

from neural_layers import GroupedQueryAttention, LayerCache, Mamba

X = torch.randn(2, 6, 8, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("mixer", [GroupedQueryAttention(8, 2), Mamba(8, 3)], ids=["attention", "mamba"])
def test_rollback_returns_to_the_snapshot(mixer) -> None:
    cache = LayerCache()
    mixer(X[:, :3], cache=cache)
    before = cache.snapshot()
    expected = mixer(X[:, 3:], cache=cache)
    cache.rollback(before)
    mixer(X[:, :2] * 5, cache=cache)  # a wrong guess
    cache.rollback(before)
    torch.testing.assert_close(mixer(X[:, 3:], cache=cache), expected, rtol=0, atol=0)


@pytest.mark.parametrize("mixer", [GroupedQueryAttention(8, 2), Mamba(8, 3)], ids=["attention", "mamba"])
def test_a_fork_goes_its_own_way(mixer) -> None:
    cache = LayerCache()
    mixer(X[:, :3], cache=cache)
    fork = cache.fork()
    mixer(X[:, :2] * 5, cache=fork)
    alone = LayerCache()
    mixer(X[:, :3], cache=alone)
    torch.testing.assert_close(mixer(X[:, 3:], cache=cache), mixer(X[:, 3:], cache=alone), rtol=0, atol=0)


def test_crop_forgets_the_last_tokens() -> None:
    mixer, cache = GroupedQueryAttention(8, 2), LayerCache()
    mixer(X, cache=cache)
    cache.crop(3)
    assert cache.get_seq_length() == 3
    torch.testing.assert_close(mixer(X[:, 3:], cache=cache), mixer(X)[:, 3:])


def test_crop_of_a_recurrent_state_is_refused_with_the_remedy() -> None:
    cache = LayerCache()
    Mamba(8)(X, cache=cache)
    cache.length = 6
    with pytest.raises(ValueError, match=r"recurrent state cannot be cropped; use snapshot\(\)"):
        cache.crop(2)


def test_crop_of_dropped_keys_is_refused() -> None:
    cache = LayerCache(window=3)
    GroupedQueryAttention(8, 2, window=3)(X, cache=cache)
    assert cache.keys.shape[2] == 2
    with pytest.raises(ValueError, match="window=3 has dropped keys"):
        cache.crop(5)
    cache.crop(6)


@pytest.mark.parametrize("length", [-1, 7])
def test_crop_beyond_the_contents_is_refused(length) -> None:
    cache = LayerCache()
    GroupedQueryAttention(8, 2)(X, cache=cache)
    with pytest.raises(ValueError, match=f"crop to {length} tokens, but the cache holds 6"):
        cache.crop(length)


@pytest.mark.parametrize("window", [None, 4])
def test_a_cache_that_drops_keys_still_in_sight_is_refused(window) -> None:
    with pytest.raises(ValueError, match=f"keeps a window of 3 tokens, and the attention has window={window}"):
        GroupedQueryAttention(8, 2, window=window)(X, cache=LayerCache(window=3))


def test_positions_shared_by_all_rows_may_have_one_row() -> None:
    mixer = GroupedQueryAttention(8, 2)
    torch.testing.assert_close(mixer(X, position_ids=torch.arange(6).unsqueeze(0)), mixer(X))


def test_a_window_below_one_is_refused() -> None:
    with pytest.raises(ValueError, match="window=0"):
        LayerCache(window=0)


def test_masks_that_do_not_cover_the_cache_are_refused() -> None:
    mixer, cache = GroupedQueryAttention(8, 2), LayerCache()
    mixer(X, cache=cache)
    with pytest.raises(ValueError, match=r"attention_mask has shape \(2, 6\); expected \(B, P \+ T\) = \(2, 12\)"):
        mixer(X, cache=cache, attention_mask=torch.ones(2, 6))
    with pytest.raises(ValueError, match=r"seq_idx has shape \(2, 5\)"):
        Mamba(8)(X, seq_idx=torch.zeros(2, 5, dtype=torch.long))
