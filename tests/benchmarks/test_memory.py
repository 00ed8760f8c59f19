"""Peak memory in a child process: the size of what is made, and what becomes of a call that cannot be made."""

import sys

import pytest

from neural_layers.benchmarks.cases import CASES
from neural_layers.benchmarks.memory import MemoryServer

linux = pytest.mark.skipif(sys.platform != "linux", reason="peak memory is measured on Linux only")
MB = 1024 * 512 * 4 / 1e6  # of a gate of 1024 × 512


@pytest.fixture(scope="module")
def server():
    with MemoryServer(threads=1) as started:
        yield started


@linux
def test_the_peak_is_that_of_the_outputs_and_gradients(server) -> None:
    peaks = server.peaks(CASES["swiglu"], {"rows": 1024, "F": 512}, "torch eager", backward=True, seconds=60)
    # forward: silu(gate) and the product; with backward also two gradients, of which one is made of the other's product
    assert peaks["forward"] == pytest.approx(2 * MB, abs=0.3)
    assert 3 * MB - 0.3 <= peaks["both"] <= 5 * MB + 0.3


@linux
def test_the_same_call_has_the_same_peak_each_time(server) -> None:
    size = {"rows": 1024, "F": 512}
    found = [
        server.peaks(CASES["swiglu"], size, "neural_layers torch", backward=False, seconds=60)["forward"]
        for _ in range(3)
    ]
    assert max(found) - min(found) < 0.2


@linux
def test_a_call_that_fails_tells_why_and_the_next_one_is_measured(server) -> None:
    size = {"rows": 1024, "F": 512}
    failed = server.peaks(CASES["swiglu"], size, "neural_layers cuda_only", backward=False, seconds=60)
    assert "swiglu has no backend 'cuda_only'" in failed["failed"]
    assert "forward" in server.peaks(CASES["swiglu"], size, "torch eager", backward=False, seconds=60)


@linux
def test_a_call_that_takes_too_long_is_ended(server) -> None:
    size = {"B": 1, "T": 10**6, "E": 4, "N": 2}
    case = CASES["selective_scan"]
    assert server.peaks(case, size, "neural_layers reference", backward=False, seconds=1) == {
        "failed": "took more than 1 s"
    }


@linux
def test_a_process_that_has_ended_is_told_and_not_waited_for() -> None:
    with MemoryServer(threads=1) as ended:
        ended.process.kill()
        ended.process.wait()
        peaks = ended.peaks(CASES["swiglu"], {"rows": 2, "F": 2}, "torch eager", backward=False, seconds=60)
    assert peaks == {"unmeasured": "the process that measures memory has ended"}
