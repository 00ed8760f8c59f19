"""The clock: how often it is read, and what happens to a call that fails."""

import pytest
import torch

from neural_layers.benchmarks import timing
from neural_layers.benchmarks.case import Call
from neural_layers.benchmarks.timing import Effort, Timed, describe_failure, forward_backward, time_in_turns


class Counting:
    """A call that counts how often it was made, and lets a clock of its own pass."""

    def __init__(self, log: list[str], name: str, seconds: float, monkeypatch: pytest.MonkeyPatch) -> None:
        self.log, self.name, self.seconds, self.grad = log, name, seconds, set[bool]()

    def __call__(self) -> torch.Tensor:
        self.log.append(self.name)
        self.grad.add(torch.is_grad_enabled())
        Clock.now += self.seconds
        return torch.zeros(1)


class Clock:
    now = 0.0


@pytest.fixture
def counting(monkeypatch):
    monkeypatch.setattr(timing.time, "perf_counter", lambda: Clock.now)
    log: list[str] = []
    return log, lambda name, seconds: Counting(log, name, seconds, monkeypatch)


def test_contenders_are_timed_in_turns_after_one_call_that_does_not_count(counting) -> None:
    log, make = counting
    contenders = [Timed(Call(make(name, 0.1)), "cpu", backward=False) for name in "ab"]
    time_in_turns(contenders, Effort(rounds=3, seconds=10, at_least=1))
    assert log == ["a", "b"] * 4
    assert [timed.times().count for timed in contenders] == [3, 3]
    assert contenders[0].times().median == pytest.approx(0.1)


def test_a_slow_call_is_timed_fewer_times(counting) -> None:
    log, make = counting
    slow = Timed(Call(make("slow", 0.2)), "cpu", backward=False)
    time_in_turns([slow], Effort(rounds=9, seconds=0.5, at_least=1))
    assert slow.times().count == 3
    slower = Timed(Call(make("slower", 20.0)), "cpu", backward=False)
    time_in_turns([slower], Effort(rounds=9, seconds=0.5, at_least=1))
    assert log.count("slower") == slower.times().count == 1
    slowest = Timed(Call(make("slowest", 20.0)), "cpu", backward=False)
    time_in_turns([slowest], Effort(rounds=9, seconds=0.5, at_least=3))
    assert log.count("slowest") == slowest.times().count == 3


def test_a_short_call_is_repeated_within_a_reading(counting) -> None:
    log, make = counting
    short = Timed(Call(make("short", 1e-5)), "cpu", backward=False)
    time_in_turns([short], Effort(rounds=2, seconds=1, at_least=1))
    assert log.count("short") == 1 + 2 * (1 + short.repeats)  # each reading after a call that is not timed
    assert short.repeats > 40
    assert short.times().median == pytest.approx(1e-5)


def test_gradients_are_enabled_for_forward_and_backward_alone(counting) -> None:
    _, make = counting
    forward = make("forward", 0.1)
    time_in_turns([Timed(Call(forward), "cpu", backward=False)], Effort(1, 1, 1))
    assert forward.grad == {False}


def test_forward_and_backward_gives_the_gradient_of_every_leaf() -> None:
    x = torch.tensor([1.0, 2.0], requires_grad=True)
    run = forward_backward(Call(lambda: x * x, (x,)))
    for _ in range(2):
        _, (grad,) = run()
        torch.testing.assert_close(grad, 2 * x.detach())


def test_a_call_that_fails_is_not_called_again_and_keeps_its_reason() -> None:
    calls = []

    def fail() -> None:
        calls.append(1)
        raise RuntimeError("out of\n  memory")

    failing = Timed(Call(fail), "cpu", backward=False)
    time_in_turns([failing], Effort(5, 1, 3))
    assert len(calls) == 1
    assert failing.failure == "RuntimeError: out of memory"


def test_quartiles_and_median_are_those_of_the_readings() -> None:
    timed = Timed(Call(lambda: None), "cpu", backward=False)
    timed.readings = [1.0, 2.0, 3.0, 4.0, 5.0]
    times = timed.times()
    assert (times.lower, times.median, times.upper, times.count) == (2.0, 3.0, 4.0, 5)


def test_a_failure_is_told_in_one_short_line() -> None:
    assert describe_failure(ValueError("a\nb")) == "ValueError: a b"
    assert len(describe_failure(ValueError("x" * 999))) == 200
