"""Timing contenders in turns in one process, so that whatever else the machine does hits all of them alike."""

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neural_layers.benchmarks.case import Call

SHORTEST = 5e-4  # seconds of one reading of the clock: shorter calls are repeated within it
# Seconds from which a first call counts as a reading: what is done once then matters little, and repeating takes long.
FIRST_COUNTS = 0.8
MOST_REPEATS = 1000
# Seconds up to which a call is made once more before each reading, so that it finds its own data in the caches, and not
# that of the contender before it, which may have left the weight that both read, or have driven it out.
WARMED = 0.05
FLUSHED_BYTES = 256 << 20  # written between two calls on a GPU: more than its cache holds


@dataclass(frozen=True)
class Effort:
    """How often a contender is timed: `rounds` times; fewer, but `at_least` so often, once it has taken `seconds`."""

    rounds: int
    seconds: float
    at_least: int


EFFORTS = {"tiny": Effort(2, 0.01, 1), "quick": Effort(7, 0.2, 1), "full": Effort(31, 6.0, 3)}


@dataclass(frozen=True)
class Times:
    """Seconds of a call: median and quartiles of `count` readings."""

    median: float
    lower: float
    upper: float
    count: int


class Timed:
    """One call under the clock, forward alone or forward + backward."""

    def __init__(self, call: Call, device: str, *, backward: bool) -> None:
        self.run = forward_backward(call) if backward else call.run
        self.grad, self.device, self.readings, self.spent = backward, device, list[float](), 0.0
        self.repeats, self.first = 0, 0.0
        self.failure = ""

    def warm_up(self) -> Any:
        """The first call: it decides how often the call is repeated within a reading; returns what it made."""
        seconds, made = self._clock(1)
        self.first = seconds
        self.repeats = min(MOST_REPEATS, int(SHORTEST / seconds) + 1) if self.device == "cpu" else 1
        if seconds > FIRST_COUNTS:
            self.spent, self.readings = seconds, [seconds]
        return made

    def read(self, effort: Effort) -> None:
        """One reading of the clock, unless this call has had its share or has failed."""
        if self.failure or not self._wants_more(effort):
            return
        try:
            if not self.repeats:
                self.warm_up()
            else:
                if self.device == "cpu" and self.first < WARMED:
                    self._clock(1)
                seconds, _ = self._clock(self.repeats)
                self.spent += seconds * self.repeats
                self.readings.append(seconds)
        except Exception as error:
            self.failure = describe_failure(error)

    def times(self) -> Times:
        """What was read."""
        if len(self.readings) == 1:
            return Times(self.readings[0], self.readings[0], self.readings[0], 1)
        lower, median, upper = statistics.quantiles(self.readings, n=4, method="inclusive")
        return Times(median, lower, upper, len(self.readings))

    def _wants_more(self, effort: Effort) -> bool:
        count = len(self.readings)
        return count < effort.at_least or (count < effort.rounds and self.spent < effort.seconds)

    def _clock(self, repeats: int) -> tuple[float, Any]:
        if self.device == "cuda":
            return self._clock_cuda()
        with torch.set_grad_enabled(self.grad):
            started = time.perf_counter()
            for _ in range(repeats):
                made = self.run()
            seconds = time.perf_counter() - started
        return seconds / repeats, made

    def _clock_cuda(self) -> tuple[float, Any]:
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        with torch.set_grad_enabled(self.grad):
            # The write also keeps the GPU busy while the call is being launched.
            torch.empty(FLUSHED_BYTES, dtype=torch.int8, device="cuda").zero_()
            start.record()
            made = self.run()
            end.record()
            torch.cuda.synchronize()
        return start.elapsed_time(end) / 1000, made


def time_in_turns(contenders: list[Timed], effort: Effort) -> None:
    """Read the clock for each contender in turn until all have had their share."""
    for _ in range(effort.rounds + 1):
        for timed in contenders:
            timed.read(effort)


def forward_backward(call: Call, ones: list[Tensor] | None = None) -> Callable[[], Any]:
    """A call that also computes the gradients of all leaves.

    ones: the outputs' gradients (`output_gradients`); made in the first call where left out
    """
    given = ones or []

    def run() -> Any:
        made = call.run()
        if not given:
            given.extend(output_gradients(made))
        return made, torch.autograd.grad(_outputs(made), call.leaves, given)

    return run


def output_gradients(made: Any) -> list[Tensor]:
    """Ones for each output of a call."""
    return [torch.ones_like(out) for out in _outputs(made)]


def _outputs(made: Any) -> tuple[Tensor, ...]:
    return made if isinstance(made, tuple) else (made,)


def describe_failure(error: BaseException) -> str:
    """An exception in one line."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}"[:200]
