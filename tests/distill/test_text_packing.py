"""Packing: documents come back exactly, and a packed loss is the loss of the documents alone."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("transformers", reason="transformers is not installed")

from neural_layers.distill.text.packing import IGNORED, pack, window
from neural_layers.distill.text.sampling import collate
from neural_layers.distill.text.store import TokenStore
from neural_layers.distill.validation.language import TextScorer, batched, windows
from neural_layers.models.hybrid import HybridConfig, HybridForCausalLM

LENGTHS = st.lists(st.integers(1, 9), min_size=1, max_size=8)


def store_of(lengths: list[int], vocabulary: int = 11) -> TokenStore:
    tokens = np.random.default_rng(sum(lengths)).integers(0, vocabulary, sum(lengths)).astype("<u2")
    starts = np.cumsum([0, *lengths[:-1]]).astype("<i8")
    return TokenStore(tokens, starts, text_bytes=3 * sum(lengths))


def runs(packed) -> list[np.ndarray]:
    return np.split(packed.input_ids, np.flatnonzero(np.diff(packed.seq_idx)) + 1)


@given(LENGTHS, st.integers(2, 12), st.integers(0, 1000))
def test_unpacking_gives_back_the_documents_exactly(lengths: list[int], context: int, seed: int) -> None:
    store = store_of(lengths)
    count = len(store)
    origin, context = seed % count, min(context, count)
    rebuilt = np.full(count, -1)
    borders = set()
    for begin in range(origin, origin + count - context + 1, context):
        packed = window(store.tokens, store.starts, begin % count, context)
        assert len(packed.input_ids) == context
        at = begin % count
        for run in runs(packed):
            # A run is a stretch of one document: it begins where the document does, or where the sequence does.
            borders.add(at)
            document = np.searchsorted(store.starts, at, side="right")
            assert np.searchsorted(store.starts, at + len(run) - 1, side="right") == document
            rebuilt[at : at + len(run)] = run
            at = (at + len(run)) % count
    seen = rebuilt >= 0
    assert np.array_equal(rebuilt[seen], store.tokens[seen])
    assert seen.sum() == count // context * context
    assert set(store.starts[seen[store.starts]]) <= borders


@given(LENGTHS, st.integers(2, 12))
def test_labels_and_positions_restart_with_every_run(lengths: list[int], context: int) -> None:
    store = store_of(lengths)
    packed = window(store.tokens, store.starts, 0, min(context, len(store)))
    for number, run in enumerate(runs(packed)):
        own = packed.seq_idx == number
        assert packed.position_ids[own].tolist() == list(range(len(run)))
        assert packed.labels[own].tolist() == [IGNORED, *run[1:]]


@pytest.fixture(scope="module")
def model() -> HybridForCausalLM:
    torch.manual_seed(0)
    mixers = ["mamba", "mamba2", "attention", "sliding_attention"]
    sizes = {"hidden_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1, "intermediate_size": 24}
    config = HybridConfig(
        vocab_size=11, num_hidden_layers=4, mixers=mixers, sliding_window=3, mamba2_head_dim=8, **sizes
    )
    return HybridForCausalLM(config).double().eval()


def test_the_packed_loss_is_that_of_the_documents_alone(model) -> None:
    store = store_of([5, 1, 7, 2, 9])
    packed = window(store.tokens, store.starts, 0, len(store))
    loss = model(**collate([packed])).loss
    nats, count = 0.0, 0
    for document in runs(packed):
        if len(document) > 1:
            ids = torch.from_numpy(document)[None]
            nats += model(ids, labels=ids).loss.item() * (len(document) - 1)
            count += len(document) - 1
    assert count == len(store) - 5
    assert loss.item() == pytest.approx(nats / count, rel=1e-10)


@given(LENGTHS, st.integers(2, 12), st.integers(1, 11))
def test_windows_predict_every_token_once_but_the_first_of_each_document(
    lengths: list[int], context: int, stride: int
) -> None:
    store = store_of(lengths)
    seen = np.zeros(len(store), dtype=int)
    stride = min(stride, context - 1)
    for number, packed in enumerate(windows(store, context, stride)):
        begin = number * stride
        counted = np.flatnonzero(packed.labels != IGNORED)
        assert np.array_equal(packed.labels[counted], store.tokens[begin + counted])
        seen[begin + counted] += 1
    expected = np.ones(len(store), dtype=int)
    expected[store.starts] = 0
    assert np.array_equal(seen, expected)


def test_the_score_of_a_text_is_the_sum_over_its_documents(model) -> None:
    store = store_of([40, 1, 33, 7])
    context = 64
    scorer = TextScorer(model, torch.device("cpu"), context)
    for inputs in batched(windows(store, context), 2):
        scorer.add(inputs)
    score = scorer.score(4, store.text_bytes)
    nats = 0.0
    # Tokens 0–63 are the first sequence and 63–80 the second: the third document is cut there.
    for low, high in ((0, 40), (41, 64), (63, 74), (74, 81)):
        ids = torch.from_numpy(store.tokens[low:high].astype(np.int64))[None]
        nats += model(ids, labels=ids).loss.item() * (high - low - 1)
    assert score.predicted == 81 - 4
    assert score.nats == pytest.approx(nats, rel=1e-6)
    by_position = scorer.by_position()
    assert sum(entry["tokens"] for entry in by_position) == score.predicted
    assert sum(entry["tokens"] * entry["loss"] for entry in by_position) == pytest.approx(nats, rel=1e-6)
    assert [(entry["first"], entry["last"]) for entry in by_position[:3]] == [(1, 1), (2, 3), (4, 7)]
    bits = (score.nats + 4 * np.log(11)) / np.log(2) / store.text_bytes
    assert score.metrics()["bits_per_byte"] == pytest.approx(bits)
    assert score.metrics()["perplexity"] == pytest.approx(np.exp(nats / score.predicted), rel=1e-6)


def test_sequences_of_one_run_need_no_borders() -> None:
    whole, divided = pack(np.arange(4), np.array([], dtype=int)), pack(np.arange(4), np.array([2]))
    assert set(collate([whole, whole])) == {"input_ids", "labels"}
    assert collate([whole, divided])["seq_idx"].tolist() == [[0, 0, 0, 0], [0, 0, 1, 1]]
