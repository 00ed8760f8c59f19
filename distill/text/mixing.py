"""Which source each training sequence comes from."""

from collections.abc import Sequence

import numpy as np

from neural_layers.errors import InputError

_PERIOD = 4096


class Mixture:
    """The source of every training sequence, a pure function of the seed and the sequence's number.

    Of each 4,096 sequences in a row every source gets its share, rounded to whole sequences but never to none, in an
    order drawn from the seed and the number of the 4,096.

    Arguments: `weights`, positive and finite, need not sum to 1.
    Raises: InputError for weights that are none of that, sum to infinity, or ask for a share under 1 in 4,096.
    """

    def __init__(self, weights: Sequence[float], seed: int) -> None:
        total = float(sum(weights))
        if not weights or not np.isfinite(total) or not all(np.isfinite(w) and w > 0 for w in weights):
            raise InputError(f"weights {list(weights)} must be positive finite numbers with a finite sum")
        shares = np.array(weights, dtype=np.float64) / total * _PERIOD
        if shares.min() < 0.5:
            smallest = weights[int(shares.argmin())]
            raise InputError(
                f"weight {smallest:g} is less than 1 in {2 * _PERIOD} of all weights; raise it or leave its source out"
            )
        self.seed = seed
        self.counts = _whole_numbers(shares)
        self._block, self._order = -1, np.empty(0, dtype=np.int64)

    def place(self, index: int) -> tuple[int, int]:
        """For the training sequence `index`: its source, and how many sequences of that source came before."""
        block, within = divmod(index, _PERIOD)
        if len(self.counts) == 1:
            return 0, index
        if block != self._block:
            generator = np.random.default_rng([self.seed, block])
            order = np.repeat(np.arange(len(self.counts)), self.counts)
            self._block, self._order = block, generator.permutation(order)
        source = int(self._order[within])
        before = int(np.count_nonzero(self._order[:within] == source))
        return source, block * int(self.counts[source]) + before


def _whole_numbers(shares: np.ndarray) -> np.ndarray:
    """Whole numbers of the same sum, each at least 1, by the largest remainders."""
    counts = np.maximum(np.floor(shares).astype(np.int64), 1)
    while (missing := _PERIOD - int(counts.sum())) != 0:
        error = shares - counts
        if missing > 0:
            counts[int(error.argmax())] += 1
        else:
            counts[int(np.where(counts > 1, error, np.inf).argmin())] -= 1
    return counts
