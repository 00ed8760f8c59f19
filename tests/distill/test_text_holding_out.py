"""The end of a text that is kept from training."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

pytest.importorskip("transformers", reason="transformers is not installed")

from neural_layers.distill.text.holding_out import hold_out, joined
from neural_layers.distill.text.store import TokenStore
from neural_layers.distill.text.tokenizing import bpe_tokenizer, token_ids

TOKENIZER = bpe_tokenizer(["plain words"], 257)  # single bytes: every other character begins within a token's reach
END = TOKENIZER.eos_token_id
TEXTS = st.lists(st.text(alphabet="ab ö世🙂", min_size=1, max_size=12), min_size=1, max_size=5)


def store_of(texts: list[str]) -> TokenStore:
    documents = [[*ids, END] for ids in token_ids(TOKENIZER, texts)]
    starts = np.cumsum([0, *(len(ids) for ids in documents[:-1])])
    return TokenStore(np.concatenate(documents).astype("<u2"), starts, sum(len(text.encode()) for text in texts))


@given(TEXTS, st.floats(0.2, 0.8))
def test_nothing_is_lost_and_no_character_is_cut(texts: list[str], fraction: float) -> None:
    store = store_of(texts)
    if not 0 < int(len(store) * fraction) < len(store):
        return
    kept, held = hold_out(store, fraction, TOKENIZER)
    assert np.concatenate([kept.tokens, held.tokens]).tolist() == store.tokens.tolist()
    assert kept.text_bytes + held.text_bytes == store.text_bytes
    both = [TOKENIZER.decode(part.tokens.tolist(), skip_special_tokens=True) for part in (kept, held)]
    assert "".join(both) == "".join(texts)
    assert [len(text.encode()) for text in both] == [kept.text_bytes, held.text_bytes]
    borders = {*kept.starts.tolist(), *(held.starts + len(kept)).tolist()}
    assert set(store.starts.tolist()) <= borders
    assert borders - set(store.starts.tolist()) <= {len(kept)}


def test_several_held_out_parts_become_one_text() -> None:
    first, second = store_of(["one", "two"]), store_of(["three"])
    whole = joined([first, second])
    assert whole.tokens.tolist() == [*first.tokens, *second.tokens]
    assert whole.starts.tolist() == [0, 4, 8]
    assert whole.text_bytes == 11


def test_a_fraction_that_leaves_nothing_is_refused() -> None:
    with pytest.raises(ValueError, match="leaves nothing to train or to validate on"):
        hold_out(store_of(["ab"]), 0.1, TOKENIZER)
