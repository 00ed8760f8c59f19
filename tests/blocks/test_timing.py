"""Latency and throughput, on a clock that the test turns."""

import numpy as np
import pytest

from neural_layers.timing import measure_latency, measure_throughput


class Clock:
    """Shows the seconds that were worked."""

    def __init__(self) -> None:
        self.now, self.calls = 0.0, list[str]()

    def __call__(self) -> float:
        return self.now

    def work(self, name: str, seconds: float) -> None:
        self.calls.append(name)
        self.now += seconds


def test_latency_has_numpys_percentiles_of_every_example_but_the_warm_up() -> None:
    clock, times = Clock(), [0.5, *(0.001 * i for i in range(1, 102))]
    left = iter(times)
    found = measure_latency({"model": lambda _: clock.work("model", next(left))}, range(101), clock=clock)
    assert found == {"model": {f"p{p}": round(float(np.percentile(range(1, 102), p)), 3) for p in (50, 95, 99)}}
    assert found["model"] == {"p50": 51.0, "p95": 96.0, "p99": 100.0}
    assert next(left, None) is None


def test_models_take_turns_and_each_begins_as_often_as_the_others() -> None:
    clock = Clock()
    models = {name: lambda _, name=name: clock.work(name, 0.001) for name in "abc"}
    measure_latency(models, range(5), clock=clock)
    rounds = ["".join(clock.calls[i : i + 3]) for i in range(0, len(clock.calls), 3)]
    assert rounds == ["abc", "bca", "cab"] * 2


def test_throughput_counts_examples_over_the_seconds_without_the_warm_up() -> None:
    clock, seen = Clock(), list[int]()

    def model(batch: list[int]) -> None:
        seen.extend(batch)
        clock.work("model", 0.1 if len(seen) > 4 else 50.0)

    assert measure_throughput({"model": model}, list(range(10)), batch_size=4, clock=clock) == {"model": 33.333}
    assert seen == [0, 1, 2, 3, *range(10)]


def test_nothing_to_measure_is_an_error() -> None:
    with pytest.raises(ValueError, match="no examples"):
        measure_latency({"model": print}, [])
    with pytest.raises(ValueError, match="0 examples in batches of 32"):
        measure_throughput({"model": print}, [])
