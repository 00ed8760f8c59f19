"""The process that measures memory: `python -m neural_layers.benchmarks.memory_server THREADS`, requests on its input.

It has the libraries loaded and has computed nothing, so that it can fork a child for each request: that is instant, and
safe because torch has no threads yet.

In a child: a call at a tiny size loads what is loaded once; then the inputs are made, freed memory is returned to the
system, the kernel's record of the peak is reset (Linux ≥ 4.0, /proc/self/clear_refs), and the call is made. The figure
is the growth of the peak without the pages of files, which are code that happened to be touched for the first time.
"""

import contextlib
import ctypes
import gc
import importlib
import json
import os
import signal
import sys
from collections.abc import Callable
from typing import Any

import torch

from neural_layers.benchmarks.case import OURS, Case, Size
from neural_layers.benchmarks.cases import CASES
from neural_layers.benchmarks.contenders import prepare
from neural_layers.benchmarks.memory import MEGA, Peaks, peaks_of
from neural_layers.benchmarks.timing import describe_failure

_CLEAR_PEAK = "5"
_MMAP_THRESHOLD, _LARGE = -3, 1 << 16  # of mallopt(3)


def _cpu_peaks(case: Case, size: Size, name: str, *, backward: bool) -> Peaks:
    peaks_of(prepare(case, case.inputs(case.tiny[0], "cpu"), name), _peak_growth, backward=backward)
    return peaks_of(prepare(case, case.inputs(size, "cpu"), name), _peak_growth, backward=backward)


def _peak_growth(run: Callable[[], Any], *, grad: bool) -> tuple[float, Any]:
    gc.collect()
    _return_freed_memory()
    with open("/proc/self/clear_refs", "w") as file:
        file.write(_CLEAR_PEAK)
    before = _status()
    with torch.set_grad_enabled(grad):
        made = run()
    after = _status()
    grown = after["VmHWM"] - before["VmRSS"] - (after["RssFile"] - before["RssFile"])
    return max(grown, 0) * 1024 / MEGA, made


def _status() -> dict[str, int]:
    """The process's memory in KiB, by the names of /proc."""
    with open("/proc/self/status") as file:
        lines = [line.split() for line in file if line.startswith(("VmHWM", "VmRSS", "RssFile"))]
    return {name.rstrip(":"): int(value) for name, value, _ in lines}


def _return_large_blocks_at_once() -> None:
    """Let glibc give back every large block when it is freed, instead of keeping some as its history has it: the peak
    is then that of what is in use, and the same in every run."""
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).mallopt(_MMAP_THRESHOLD, _LARGE)


def _return_freed_memory() -> None:
    # Without glibc nothing is held back, or it cannot be asked for.
    with contextlib.suppress(AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


def _answer_in_child(request: dict[str, Any], case: Case) -> Peaks:
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            # The system ends the child at the alarm, whatever library it is in.
            signal.alarm(request["seconds"])
            try:
                peaks = _cpu_peaks(case, request["size"], request["name"], backward=request["backward"])
            except Exception as error:
                peaks = {"failed": describe_failure(error)}
            os.write(writer, json.dumps(peaks).encode())
        finally:
            os._exit(0)
    os.close(writer)
    with os.fdopen(reader, "rb") as file:
        answer = file.read()
    _, status = os.waitpid(child, 0)
    if answer:
        return dict(json.loads(answer))
    ended_by = os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0
    reasons: dict[int, str] = {
        signal.SIGALRM: f"took more than {request['seconds']} s",
        signal.SIGKILL: "killed by the system, as it is where memory runs out",
    }
    return {"failed": reasons.get(ended_by, f"its process was ended by signal {ended_by}")}


def _load_modules_of(case: Case, name: str) -> None:
    """Load a peer's library before the fork, so that its children need not."""
    if name.startswith(OURS):
        return
    try:
        importlib.import_module(next(peer for peer in case.peers if peer.name == name).module)
    except Exception:
        return  # the child meets the same, and tells it


def _serve(threads: int) -> None:
    # Libraries print; the answers go where only this function writes.
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    torch.set_num_threads(threads)
    _return_large_blocks_at_once()
    if not (hasattr(os, "fork") and os.access("/proc/self/clear_refs", os.W_OK)):
        for _ in sys.stdin:
            print(json.dumps({"unmeasured": "peak memory is measured on Linux only"}), file=answers, flush=True)
        return
    for line in sys.stdin:
        request = json.loads(line)
        case = CASES[request["case"]]
        _load_modules_of(case, request["name"])
        gc.freeze()  # a collection in a child would otherwise walk, and so copy, all that was loaded
        print(json.dumps(_answer_in_child(request, case)), file=answers, flush=True)


if __name__ == "__main__":
    _serve(int(sys.argv[1]))
    os._exit(0)  # without the libraries' farewells, some of which print
