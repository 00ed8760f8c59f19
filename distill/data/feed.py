"""Batches of examples, the same ones for the same step."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Batches that are sorted by length together, as transformers' LengthGroupedSampler does it: enough to pad little, few
# enough to stay random.
_GROUPED_BATCHES = 50


class ExampleFeed:
    """Batches of a dataset's examples in a random order, a pure function of the seed and the step: nothing to save.

    examples:   `len` and `[i]`, or `in_epoch(i, epoch)` where an example changes from epoch to epoch
    collate:    makes a batch of tensors out of a list of examples. "index" (B,), the examples' numbers, is added to it.
    batch_size: of one forward pass of one process. accumulate: forward passes of an optimiser step
    lengths:    of the examples: batches are then of like length, to pad little
    weights:    how often each example is drawn, with replacement; without, each comes once in an epoch
    rank, world: the process and how many there are; each takes its part of every batch

    An epoch leaves out the examples that no longer fill a step.
    Raises ValueError for sizes under 1, for no examples, and for lengths or weights that are not one for each example;
    for weights that are negative, not finite or all zero.
    """

    def __init__(
        self,
        examples: Any,
        collate: Callable[[list[Any]], dict[str, Tensor]],
        *,
        batch_size: int,
        accumulate: int = 1,
        seed: int = 0,
        lengths: Sequence[int] | None = None,
        weights: Sequence[float] | None = None,
        rank: int = 0,
        world: int = 1,
    ) -> None:
        for name, size in (("batch_size", batch_size), ("accumulate", accumulate), ("world", world)):
            if size < 1:
                raise ValueError(f"{name}={size} must be at least 1")
        for name, values in (("lengths", lengths), ("weights", weights)):
            if values is not None and len(values) != len(examples):
                raise ValueError(f"{len(values)} {name} for {len(examples)} examples; give one for each")
        if not len(examples):
            raise ValueError("no examples to make batches of; give at least one")
        self.step_size = batch_size * accumulate * world
        # Where a step takes more examples than there are, an epoch holds each of them several times.
        self._rounds = -(-self.step_size // len(examples))
        self.examples, self.collate, self.seed = examples, collate, seed
        self.batch_size, self.accumulate, self.rank, self.world = batch_size, accumulate, rank, world
        self._lengths = None if lengths is None else np.asarray(lengths)
        self._shares = None if weights is None else _shares(weights)
        self._order: tuple[int, np.ndarray] = (-1, np.empty(0, dtype=np.int64))

    @property
    def steps_per_epoch(self) -> int:
        """Optimiser steps in which every example comes once (or several times, where there are few)."""
        return self._rounds * len(self.examples) // self.step_size

    def batches(self, step: int) -> Iterator[dict[str, Tensor]]:
        """This process's batches from optimiser step `step` on."""
        for number in itertools.count(step * self.accumulate):
            at, part = divmod(number, self.accumulate)
            epoch, within = divmod(at, self.steps_per_epoch)
            start = within * self.step_size + (part * self.world + self.rank) * self.batch_size
            rows = self._epoch(epoch)[start : start + self.batch_size]
            batch = self.collate([self._example(int(row), epoch) for row in rows])
            yield {**batch, "index": torch.from_numpy(rows.copy())}

    def _example(self, row: int, epoch: int) -> Any:
        # An augmented dataset gives another example in each epoch, and says so by this name.
        in_epoch = getattr(self.examples, "in_epoch", None)
        return self.examples[row] if in_epoch is None else in_epoch(row, epoch)

    def state(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Nothing to do."""

    def _epoch(self, epoch: int) -> np.ndarray:
        if self._order[0] != epoch:
            generator = np.random.default_rng([self.seed, epoch])
            order = np.concatenate([self._drawn(generator) for _ in range(self._rounds)])
            self._order = epoch, order if self._lengths is None else self._grouped(order, generator)
        return self._order[1]

    def _drawn(self, generator: np.random.Generator) -> np.ndarray:
        count = len(self.examples)
        if self._shares is None:
            return generator.permutation(count)
        return generator.choice(count, size=count, p=self._shares)

    def _grouped(self, order: np.ndarray, generator: np.random.Generator) -> np.ndarray:
        """The order with batches of like length: chunks of it are sorted, and their batches shuffled again."""
        assert self._lengths is not None
        whole = len(order) // self.step_size * self.step_size
        chunk = self.batch_size * self.world * _GROUPED_BATCHES
        parts = [order[start : min(start + chunk, whole)] for start in range(0, whole, chunk)]
        batches = np.concatenate([part[np.argsort(self._lengths[part], kind="stable")] for part in parts])
        batches = batches.reshape(-1, self.batch_size * self.world)
        return batches[generator.permutation(len(batches))].reshape(-1)


def _shares(weights: Sequence[float]) -> np.ndarray:
    values = np.asarray(weights, dtype=np.float64)
    if not np.isfinite(values).all() or (values < 0).any() or not values.any():
        raise ValueError("weights must be finite, not negative, and not all zero")
    return values / values.sum()
