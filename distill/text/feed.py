"""Batches for a training step, cut for each process."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from neural_layers.distill.text.sampling import PackedSampler, collate


@dataclass(frozen=True)
class BatchPlan:
    """Which training sequences a process takes.

    batch:      sequences of one forward pass, over all processes
    accumulate: forward passes of one optimiser step
    rank, world: the process and how many there are; `batch` is a multiple of `world`
    """

    batch: int
    accumulate: int = 1
    rank: int = 0
    world: int = 1

    @property
    def own(self) -> int:
        """Sequences of one forward pass of this process."""
        return self.batch // self.world

    @property
    def step(self) -> int:
        """Sequences of one optimiser step, over all processes."""
        return self.batch * self.accumulate

    def is_mine(self, index: int) -> bool:
        """Whether the training sequence `index` belongs to this process."""
        return index % self.batch // self.own == self.rank


class SampledFeed:
    """Batches of a `PackedSampler`: a pure function of its seed and the step, so that there is no state."""

    def __init__(self, sampler: PackedSampler, plan: BatchPlan) -> None:
        self.sampler, self.plan = sampler, plan

    def batches(self, step: int) -> Iterator[dict[str, Tensor]]:
        """This process's batches from optimiser step `step` on."""
        for first in itertools.count(step * self.plan.step + self.plan.rank * self.plan.own, self.plan.batch):
            yield collate([self.sampler.sample(index) for index in range(first, first + self.plan.own)])

    def state(self) -> dict[str, Any]:
        """Nothing."""
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        """Nothing to do."""
