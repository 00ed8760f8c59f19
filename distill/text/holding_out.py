"""The end of a text, kept from training to validate on."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from neural_layers.distill.text.store import TokenStore


def hold_out(store: TokenStore, fraction: float, tokenizer: Any) -> tuple[TokenStore, TokenStore]:
    """A store without about the last `fraction` of its tokens, and a store of these.

    The cut is moved on to where a document begins, if one does in the part that is held out, else to where a character
    does. Raises ValueError for a fraction that leaves nothing on either side.
    """
    cut = len(store) - int(len(store) * fraction)
    if not 0 < cut < len(store):
        raise ValueError(f"a fraction of {fraction} of {len(store)} tokens leaves nothing to train or to validate on")
    later = store.starts[store.starts >= cut]
    if len(later):
        cut = int(later[0])
    else:
        # A token of bytes may begin within a character, which would be decoded as one that stands for broken ones.
        while cut < len(store) - 1 and tokenizer.decode(store.tokens[cut : cut + 4].tolist()).startswith("\ufffd"):
            cut += 1
    held = store.tokens[cut:]
    starts = np.concatenate([[cut], store.starts[store.starts > cut]]) - cut
    size = len(tokenizer.decode(held.tolist(), skip_special_tokens=True).encode())
    kept = TokenStore(
        store.tokens[:cut], store.starts[store.starts < cut], store.text_bytes - size, store.key, store.reused
    )
    return kept, TokenStore(held, starts, size, store.key, store.reused)


def joined(stores: Sequence[TokenStore]) -> TokenStore:
    """One store, in memory, of the documents of several."""
    offsets = np.cumsum([0, *(len(store) for store in stores)])
    starts = [store.starts + offset for store, offset in zip(stores, offsets, strict=False)]
    tokens = np.concatenate([np.asarray(store.tokens, dtype=np.int64) for store in stores])
    return TokenStore(tokens, np.concatenate(starts), sum(store.text_bytes for store in stores), stores[0].key)
