"""Peak memory of a call above its inputs, in megabytes (10⁶ bytes).

On the CPU each call is made once in a child process of its own (`memory_server.py`), because another call's leftovers
in the allocator would hide what this one needs, and because a child that the system kills, for want of memory, takes
nobody with it. On a GPU torch's allocator keeps the record.
"""

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import torch

from neural_layers.benchmarks.case import Call, Case, Size
from neural_layers.benchmarks.timing import forward_backward, output_gradients

MEGA = 1e6
SECONDS = {"tiny": 60, "quick": 150, "full": 600}  # a call that takes longer is not timed either

Peaks = dict[str, Any]


class MemoryServer:
    """Measures calls on the CPU, each in a child process. Use as a context manager."""

    def __init__(self, threads: int) -> None:
        # As for a user's process, but for MKL: its buffers that outlive a call would make the next one look smaller.
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "MKL_DISABLE_FAST_MM": "1"}
        command = [sys.executable, "-m", "neural_layers.benchmarks.memory_server", str(threads)]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
        )

    def __enter__(self) -> "MemoryServer":
        return self

    def __exit__(self, *exception: object) -> None:
        self.process.terminate()
        # Closing sends what is left in the pipe, which nobody reads where the process has ended before.
        with contextlib.suppress(BrokenPipeError):
            self.process.communicate()

    def peaks(self, case: Case, size: Size, name: str, *, backward: bool, seconds: int) -> Peaks:
        """{"forward": MB, "both": MB}; {"failed": why} where the call fails, {"unmeasured": why} where none can say."""
        request = {"case": case.name, "size": dict(size), "name": name, "backward": backward, "seconds": seconds}
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(request) + "\n")
            self.process.stdin.flush()
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        peaks: Peaks = json.loads(answer) if answer else {"unmeasured": "the process that measures memory has ended"}
        return peaks


def cuda_peaks(call: Call, *, backward: bool) -> Peaks:
    """The same on a GPU, by the allocator's own record, in this process."""
    return peaks_of(call, _cuda_growth, backward=backward)


def peaks_of(call: Call, growth: Callable[..., tuple[float, Any]], *, backward: bool) -> Peaks:
    """Forward and, where asked for, forward + backward, by a function that calls and returns (MB, what was made)."""
    grown, made = growth(call.run, grad=False)
    peaks = {"forward": grown}
    if backward:
        ones = output_gradients(made)  # beforehand: they are inputs
        del made
        peaks["both"], _ = growth(forward_backward(call, ones), grad=True)
    return peaks


def _cuda_growth(run: Callable[[], Any], *, grad: bool) -> tuple[float, Any]:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    with torch.set_grad_enabled(grad):
        made = run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / MEGA, made
