"""Which sequence comes when: mixtures, epochs, streams, and the share of each process."""

from collections import Counter
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("transformers", reason="transformers is not installed")

from neural_layers.distill.text import streaming
from neural_layers.distill.text.errors import TextError
from neural_layers.distill.text.feed import BatchPlan, SampledFeed
from neural_layers.distill.text.mixing import Mixture
from neural_layers.distill.text.reading import ReadingOptions
from neural_layers.distill.text.sampling import PackedSampler
from neural_layers.distill.text.sources import parse_sources
from neural_layers.distill.text.store import TokenStore
from neural_layers.distill.text.streaming import SourceStream, StreamedFeed
from neural_layers.distill.text.tokenizing import character_tokenizer
from neural_layers.errors import InputError

LETTERS = "abcdefghijklmnopqrstuvwxyz "
TOKENIZER = character_tokenizer([LETTERS])


def counting_store(count: int, first: int = 0, starts=(0,)) -> TokenStore:
    return TokenStore(np.arange(first, first + count, dtype="<u2"), np.array(starts, dtype="<i8"), count)


@given(st.lists(st.floats(0.01, 50), min_size=1, max_size=5), st.integers(0, 99))
def test_every_source_gets_its_share_and_places_count_up(weights: list[float], seed: int) -> None:
    mixture, total = Mixture(weights, seed), 4096
    places = [mixture.place(index) for index in range(total)]
    shares = np.array(weights) / sum(weights)
    counts = np.array([sum(source == k for source, _ in places) for k in range(len(weights))])
    assert np.abs(counts - np.maximum(shares * total, 1)).max() <= len(weights)
    for k in range(len(weights)):
        assert [number for source, number in places if source == k] == list(range(counts[k]))


def test_a_mixture_is_a_pure_function_of_seed_and_number() -> None:
    indices = [5, 4096, 3, 9000, 4097, 5]
    first, second = Mixture([1, 2, 3], 7), Mixture([1, 2, 3], 7)
    assert [first.place(i) for i in indices] == [second.place(i) for i in reversed(indices)][::-1]
    other = [Mixture([1, 2, 3], 8).place(i)[0] for i in range(100)]
    assert other != [first.place(i)[0] for i in range(100)]
    assert first.place(4096 + 10)[0] in (0, 1, 2)


@pytest.mark.parametrize("weights", [[], [1, 0], [1, -1], [float("nan")], [1e308, 1e308], [1, 1e-5]])
def test_weights_that_do_not_fit_are_refused(weights: list[float]) -> None:
    with pytest.raises(InputError, match="weight"):
        Mixture(weights, 0)


@given(st.integers(5, 60), st.integers(2, 5), st.integers(0, 50))
def test_an_epoch_uses_every_token_once_but_less_than_one_sequence(count: int, context: int, seed: int) -> None:
    sampler = PackedSampler([counting_store(count)], [1.0], ["a"], context, seed)
    sequences = count // context
    for epoch in range(3):
        samples = [sampler.sample(epoch * sequences + i) for i in range(sequences)]
        tokens = Counter(int(token) for sample in samples for token in sample.input_ids)
        assert set(tokens.values()) == {1}
        assert sum(tokens.values()) == sequences * context > count - context


def test_a_text_shorter_than_a_sequence_is_told_with_its_length() -> None:
    with pytest.raises(TextError, match="b has 7 tokens, fewer than the 8 of one sequence; .* --context 7 or less"):
        PackedSampler([counting_store(9), counting_store(7)], [1, 1], ["a", "b"], 8, 0)


def rows(feed, step: int, count: int) -> list[list[list[int]]]:
    return [batch["input_ids"].tolist() for batch in islice(feed.batches(step), count)]


@pytest.fixture
def streams(tmp_path, monkeypatch):
    monkeypatch.setattr(streaming, "WINDOW", 4)
    generator = np.random.default_rng(0)
    for name in ("a", "b"):
        for part in range(3):
            text = "".join(generator.choice(list(LETTERS), 40 + 9 * part))
            (tmp_path / f"{name}{part}.txt").write_text(text)

    def build() -> list[SourceStream]:
        sources = parse_sources([f"{tmp_path}/a*.txt=3", f"{tmp_path}/b*.txt"])
        options = ReadingOptions(separator="  ")
        return [SourceStream(source, TOKENIZER, options, 8, 5, number) for number, source in enumerate(sources)]

    return build


def make_feed(kind: str, streams, plan: BatchPlan):
    if kind == "sampled":
        stores = [counting_store(100, starts=(0, 30, 31, 77)), counting_store(64, 1000)]
        return SampledFeed(PackedSampler(stores, [3, 1], ["a", "b"], 8, 5), plan)
    return StreamedFeed(streams(), [3, 1], plan, 5)


@pytest.mark.parametrize("kind", ["sampled", "streamed"])
@pytest.mark.parametrize("step", [1, 3, 9])
def test_a_feed_continues_exactly_where_it_stood(streams, kind: str, step: int) -> None:
    plan = BatchPlan(batch=3, accumulate=2)
    whole = make_feed(kind, streams, plan)
    batches = whole.batches(0)
    for _ in range(step * 2):
        next(batches)
    state = whole.state()
    expected = [batch["input_ids"].tolist() for batch in islice(batches, 20)]
    again = make_feed(kind, streams, plan)
    again.restore(state)
    assert rows(again, step, 20) == expected


@pytest.mark.parametrize("kind", ["sampled", "streamed"])
def test_processes_share_the_batches_of_one(streams, kind: str) -> None:
    alone = rows(make_feed(kind, streams, BatchPlan(4, 2)), 0, 9)
    shares = [rows(make_feed(kind, streams, BatchPlan(4, 2, rank, 2)), 0, 9) for rank in range(2)]
    assert [first + second for first, second in zip(*shares, strict=True)] == alone


def test_a_stream_gives_every_token_of_an_epoch_once_in_documents_of_their_own(streams) -> None:
    (stream, _) = streams()
    texts = [piece.text for part in stream.source.parts for piece in part.read(stream.reading)]
    total = sum(len(text) + 1 for text in texts)
    samples = [next(stream) for _ in range(total // 8)]
    seen = Counter(int(token) for sample in samples for token in sample.input_ids)
    expected = Counter(token for text in texts for token in [*TOKENIZER(text)["input_ids"], TOKENIZER.eos_token_id])
    # But for less than a window, which reaches into the next epoch.
    assert sum((expected - seen).values()) < 4 * 8
    for sample in samples:
        ends = np.flatnonzero(sample.input_ids[:-1] == TOKENIZER.eos_token_id)
        assert np.array_equal(np.flatnonzero(np.diff(sample.seq_idx)), ends)


def test_an_empty_or_short_stream_is_told_before_training(tmp_path) -> None:
    for name, content, message in (("e.txt", "", "no text in it"), ("s.txt", "abc", "has 4 tokens, fewer than the 8")):
        (tmp_path / name).write_text(content)
        stream = SourceStream(parse_sources([f"{tmp_path}/{name}"])[0], TOKENIZER, ReadingOptions(), 8, 0)
        with pytest.raises(TextError, match=message):
            stream.check()


def test_batches_are_tensors_of_the_model(streams) -> None:
    batch = next(make_feed("streamed", streams, BatchPlan(3)).batches(0))
    assert {"input_ids", "labels"} <= set(batch)
    assert {(value.dtype, value.shape) for value in batch.values()} == {(torch.int64, torch.Size([3, 8]))}
