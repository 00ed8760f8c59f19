"""Timing contenders in turns, so that whatever else the machine does hits all of them alike."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class Case:
    """One op at one size: named calls that take the same inputs, each of which gets a gradient."""

    size: str
    inputs: tuple[Tensor, ...]
    contenders: Mapping[str, Callable[..., Any]]


def medians(case: Case, repeats: int) -> dict[str, tuple[float, float]]:
    """Median milliseconds of each contender, forward alone and forward + backward; the first round warms up."""
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in case.contenders}
    for _ in range(repeats + 1):
        for name, call in case.contenders.items():
            times[name].append((_forward(call, case.inputs), _forward_backward(call, case.inputs)))
    return {
        name: (statistics.median(f for f, _ in t[1:]), statistics.median(b for _, b in t[1:]))
        for name, t in times.items()
    }


@torch.no_grad()
def _forward(call: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> float:
    started = time.perf_counter()
    call(*inputs)
    return (time.perf_counter() - started) * 1000


def _forward_backward(call: Callable[..., Tensor], inputs: tuple[Tensor, ...]) -> float:
    inputs = tuple(x.detach().requires_grad_() for x in inputs)
    started = time.perf_counter()
    out = call(*inputs)
    torch.autograd.grad(out, inputs, torch.ones_like(out))
    return (time.perf_counter() - started) * 1000
