"""How long models take: for one example at a time, and in batches. They take turns: a busy machine slows them all."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch

Example = TypeVar("Example")
SHARES = {"p50": 50, "p95": 95, "p99": 99}


def measure_latency(
    callables: Mapping[str, Callable[[Example], Any]],
    examples: Sequence[Example],
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, dict[str, float]]:
    """Milliseconds for one example: {name: {"p50", "p95", "p99"}}.

    callables: what each model does with one example. examples: at least one; the first is also the warm-up, whose time
    is left out. Every model has its turn at an example before the next example comes, and another begins each time.
    Percentiles are interpolated between the measured times: of fewer than 100 examples, p99 is close to the slowest.
    Raises ValueError without examples.
    """
    if not examples:
        raise ValueError("no examples to measure latency on; give at least one")
    return {name: percentiles(times) for name, times in take_turns(callables, examples, clock=clock).items()}


def measure_throughput(
    callables: Mapping[str, Callable[[Sequence[Example]], Any]],
    examples: Sequence[Example],
    *,
    batch_size: int = 32,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, float]:
    """Examples per second in batches: {name: number}.

    callables: what each model does with a batch. The models take turns at the batches; a first one warms them up.
    Raises ValueError without examples and for a batch_size below 1.
    """
    if not examples or batch_size < 1:
        raise ValueError(f"{len(examples)} examples in batches of {batch_size}; give at least one of each")
    batches = [examples[start : start + batch_size] for start in range(0, len(examples), batch_size)]
    taken = take_turns(callables, batches, clock=clock)
    return {name: round(len(examples) / max(sum(times), 1e-9), 3) for name, times in taken.items()}


def take_turns(
    callables: Mapping[str, Callable[[Example], Any]],
    examples: Sequence[Example],
    *,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, list[float]]:
    """Seconds of each model for each example, in the order of the examples; a first call of each is not counted."""
    names, taken = list(callables), {name: list[float]() for name in callables}
    for turn, example in enumerate([*examples[:1], *examples]):
        first = turn % max(len(names), 1)
        for name in names[first:] + names[:first]:
            started = clock()
            callables[name](example)
            taken[name].append(clock() - started)
    return {name: times[1:] for name, times in taken.items()}


def percentiles(seconds: Sequence[float]) -> dict[str, float]:
    """Milliseconds: {"p50", "p95", "p99"}."""
    times = 1000 * torch.tensor(seconds, dtype=torch.float64)
    return {name: round(float(times.quantile(share / 100)), 3) for name, share in SHARES.items()}
