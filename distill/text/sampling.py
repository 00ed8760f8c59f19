"""Training sequences out of token stores, and batches of them."""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from neural_layers.distill.text.errors import TextError
from neural_layers.distill.text.mixing import Mixture
from neural_layers.distill.text.packing import Packed, window
from neural_layers.distill.text.store import TokenStore


class PackedSampler:
    """The training sequence of every number, a pure function of the seed and the number: nothing to save or restore.

    A source's tokens form a ring; an epoch cuts it from a random point into as many full sequences as it holds and
    takes them in a random order, the next epoch from another point. So every token of an epoch is used once, but for
    less than one sequence, and a border falls elsewhere each time.

    stores, weights, names: of the sources. context: tokens of a sequence.
    Raises: TextError where a source has fewer tokens than a sequence takes.
    """

    def __init__(
        self, stores: Sequence[TokenStore], weights: Sequence[float], names: Sequence[str], context: int, seed: int
    ) -> None:
        for store, name in zip(stores, names, strict=True):
            check_length(len(store), context, name)
        self.stores, self.context, self.seed = stores, context, seed
        self.mixture = Mixture(weights, seed)
        self._orders: dict[int, tuple[int, int, np.ndarray]] = {}

    def sample(self, index: int) -> Packed:
        """The training sequence number `index`, counted from 0 over all sources."""
        source, number = self.mixture.place(index)
        store = self.stores[source]
        epoch, within = divmod(number, len(store) // self.context)
        origin, order = self._epoch(source, epoch)
        begin = (origin + int(order[within]) * self.context) % len(store)
        return window(store.tokens, store.starts, begin, self.context)

    def _epoch(self, source: int, epoch: int) -> tuple[int, np.ndarray]:
        if self._orders.get(source, (-1,))[0] != epoch:
            generator = np.random.default_rng([self.seed, source, epoch])
            length = len(self.stores[source])
            origin = int(generator.integers(length))
            self._orders[source] = epoch, origin, generator.permutation(length // self.context)
        return self._orders[source][1:]


def check_length(tokens: int, context: int, name: str) -> None:
    """Raise TextError where a text has fewer tokens than a sequence takes."""
    if tokens < context:
        raise TextError(
            f"{name} has {tokens} tokens, fewer than the {context} of one sequence; give more text, or --context "
            f"{max(tokens, 2)} or less"
        )


def collate(samples: Sequence[Packed]) -> dict[str, Tensor]:
    """A batch of sequences as the model takes it: `input_ids`, `labels`, `seq_idx`, `position_ids`, each (B, T).

    The last two are left out where every sequence is one run: the model is faster without, and its result the same.
    """
    names = ["input_ids", "labels"]
    if any(sample.seq_idx[-1] for sample in samples):
        names += ["seq_idx", "position_ids"]
    return {name: torch.from_numpy(np.stack([getattr(sample, name) for sample in samples])) for name in names}
