"""Training sequences with their numbers, by which a teacher's answers are kept."""

import itertools
from collections.abc import Iterator

import torch
from torch import Tensor

from neural_layers.distill.text.feed import SampledFeed
from neural_layers.distill.text.packing import Packed
from neural_layers.distill.text.sampling import PackedSampler


class NumberedFeed(SampledFeed):
    """A `SampledFeed` whose batches also hold "index" (B,), the numbers of the training sequences."""

    def batches(self, step: int) -> Iterator[dict[str, Tensor]]:
        plan = self.plan
        firsts = itertools.count(step * plan.step + plan.rank * plan.own, plan.batch)
        for first, batch in zip(firsts, super().batches(step), strict=False):
            yield {**batch, "index": torch.arange(first, first + plan.own)}


class Sequences:
    """The first `count` training sequences of a sampler, as examples of a teacher cache."""

    def __init__(self, sampler: PackedSampler, count: int) -> None:
        self.sampler, self.count = sampler, count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Packed:
        return self.sampler.sample(index)
