"""ExampleFeed: the same batch for the same step, every example once, parts that make up the whole."""

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from neural_layers.distill.data.feed import ExampleFeed

PROPERTY = settings(max_examples=40, deadline=None, derandomize=True, database=None)


def collate(rows: list[int]) -> dict[str, torch.Tensor]:
    return {"rows": torch.tensor(rows)}


def take(feed: ExampleFeed, steps: int, start: int = 0) -> list[list[int]]:
    batches = itertools.islice(feed.batches(start), steps * feed.accumulate)
    return [batch["index"].tolist() for batch in batches]


sizes = st.fixed_dictionaries(
    {"batch_size": st.integers(1, 5), "accumulate": st.integers(1, 3), "seed": st.integers(0, 9)}
)


@PROPERTY
@given(sizes, st.integers(1, 60), st.booleans(), st.integers(0, 20))
def test_batches_from_any_step_are_those_of_the_whole_run(given_sizes, count, is_grouped, start) -> None:
    lengths = [(7 * i) % 11 for i in range(count)] if is_grouped else None
    make = lambda: ExampleFeed(list(range(count)), collate, lengths=lengths, **given_sizes)  # noqa: E731
    whole = take(make(), start + 6)
    assert take(make(), 6, start) == whole[start * given_sizes["accumulate"] :]


@PROPERTY
@given(sizes, st.integers(1, 60), st.booleans())
def test_an_epoch_holds_every_example_as_often_as_every_other(given_sizes, count, is_grouped) -> None:
    lengths = [(7 * i) % 11 for i in range(count)] if is_grouped else None
    feed = ExampleFeed(list(range(count)), collate, lengths=lengths, **given_sizes)
    seen = np.bincount(np.concatenate(take(feed, feed.steps_per_epoch)), minlength=count)
    rounds = -(-feed.step_size // count)
    assert seen.max() <= rounds
    assert seen.sum() == feed.steps_per_epoch * feed.step_size > rounds * count - feed.step_size


@PROPERTY
@given(sizes, st.integers(8, 60), st.booleans())
def test_processes_share_the_batches_of_one(given_sizes, count, is_grouped) -> None:
    lengths = [(7 * i) % 11 for i in range(count)] if is_grouped else None
    batch_size = given_sizes.pop("batch_size")
    one = ExampleFeed(list(range(count)), collate, lengths=lengths, batch_size=2 * batch_size, **given_sizes)
    two = [
        ExampleFeed(list(range(count)), collate, lengths=lengths, batch_size=batch_size, rank=r, world=2, **given_sizes)
        for r in (0, 1)
    ]
    parts = zip(*(take(feed, 4) for feed in two), strict=True)
    assert take(one, 4) == [first + second for first, second in parts]


def test_another_seed_and_another_epoch_give_another_order() -> None:
    feed, other = (ExampleFeed(list(range(40)), collate, batch_size=4, seed=seed) for seed in (0, 1))
    assert take(feed, 10) != take(other, 10)
    assert take(feed, 10) != take(feed, 10, start=10)


def test_batches_are_of_like_length() -> None:
    random = np.random.default_rng(0)
    lengths = random.integers(1, 100, 400)
    spreads = []
    for grouped in (None, lengths):
        feed = ExampleFeed(list(range(400)), collate, batch_size=8, lengths=grouped)
        spreads.append(np.mean([np.ptp(lengths[rows]) for rows in take(feed, 50)]))
    assert spreads[1] < 0.1 * spreads[0]


def test_weights_say_how_often_an_example_comes() -> None:
    weights = [0.0] + [1.0] * 9 + [5.0] * 10
    feed = ExampleFeed(list(range(20)), collate, batch_size=10, weights=weights)
    seen = np.bincount(np.concatenate(take(feed, 2000)), minlength=20)
    assert seen[0] == 0
    assert seen[10:].mean() / seen[1:10].mean() == pytest.approx(5, rel=0.1)


def test_an_example_may_change_from_epoch_to_epoch() -> None:
    class Augmented(list):
        def in_epoch(self, row: int, epoch: int) -> int:
            return self[row] + 100 * epoch

    feed = ExampleFeed(Augmented(range(4)), collate, batch_size=2)
    rows = [batch["rows"].tolist() for batch in itertools.islice(feed.batches(0), 4)]
    assert sorted(rows[0] + rows[1]) == [0, 1, 2, 3]
    assert sorted(rows[2] + rows[3]) == [100, 101, 102, 103]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size=0 must be at least 1"),
        ({"accumulate": 0}, "accumulate=0 must be at least 1"),
        ({"lengths": [1]}, "1 lengths for 3 examples"),
        ({"weights": [1.0, -1.0, 1.0]}, "not negative"),
        ({"weights": [0.0, 0.0, 0.0]}, "not all zero"),
        ({"weights": [1.0, float("nan"), 1.0]}, "finite"),
    ],
)
def test_bad_arguments_are_named(changes, message) -> None:
    with pytest.raises(ValueError, match=message):
        ExampleFeed([0, 1, 2], collate, **{"batch_size": 1, **changes})
    with pytest.raises(ValueError, match="no examples"):
        ExampleFeed([], collate, batch_size=1)
