"""What a law looks at: a mixer, an input, and how to run the one on the other."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass
class Subject:
    """A mixer in evaluation mode with an input x (B, T, D) of its dtype, and a generator for all that is random."""

    mixer: nn.Module
    x: Tensor
    make_cache: Callable[[], Any]
    generator: torch.Generator

    @property
    def batch(self) -> int:
        return self.x.shape[0]

    @property
    def length(self) -> int:
        return self.x.shape[1]

    def randint(self, low: int, high: int) -> int:
        """An integer from low to high, both included."""
        return int(torch.randint(low, high + 1, (), generator=self.generator))

    def randn(self, *shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=self.generator).to(self.x.dtype)

    def random_split(self) -> list[int]:
        """Chunk lengths of at least one that add up to T: two chunks or more, where T allows."""
        lengths, left = [self.randint(1, max(self.length - 1, 1))], self.length
        left -= lengths[0]
        while left:
            lengths.append(self.randint(1, left))
            left -= lengths[-1]
        return lengths

    def in_chunks(self, x: Tensor, lengths: Sequence[int], cache: Any = None, **masks: Tensor) -> Tensor:
        """Run x chunk by chunk through one cache. `masks` are given up to the end of each chunk, as they cover the
        past; `position_ids` only for the chunk."""
        cache = self.make_cache() if cache is None else cache
        outputs, start = [], 0
        for length in lengths:
            end = start + length
            given = {k: v[..., start if k == "position_ids" else 0 : end] for k, v in masks.items()}
            outputs.append(self.mixer(x[:, start:end], cache=cache, **given))
            start = end
        return torch.cat(outputs, dim=1)


def deviation(actual: Tensor, expected: Tensor) -> float:
    """Largest difference relative to the largest magnitude expected; infinite where a number is not finite."""
    if actual.shape != expected.shape:
        raise AssertionError(f"shape {tuple(actual.shape)} instead of {tuple(expected.shape)}")
    if actual.numel() == 0:
        return 0.0
    error = ((actual - expected).abs().max() / expected.abs().max().clamp_min(1e-3)).item()
    return error if error == error else float("inf")


def gradients(subject: Subject, output: Tensor, x: Tensor, weight: Tensor) -> list[Tensor]:
    """The gradients of Σ output·weight by x and by each parameter (zeros for one that is not used)."""
    wanted = [x, *(p for p in subject.mixer.parameters() if p.requires_grad)]
    return list(torch.autograd.grad((output * weight).sum(), wanted, materialize_grads=True))
