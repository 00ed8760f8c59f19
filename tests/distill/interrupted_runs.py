"""Runs that are killed at chosen places, and continued: `python -m tests.distill.interrupted_runs FOLDER`.

Writes FOLDER/found.json: of every place the signal that ended the run there, and the SHA-256 of the weights that it
came to in the end; "undisturbed" is the run that nobody killed. Each run is a process of its own, forked from this one,
which has imported everything and has one thread.
"""

import gc
import hashlib
import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from neural_layers.distill import checkpoint, gate_state
from tests.distill.gated_runs import AccuracyValidator, spiked_run


def kill_before(holder: Any, name: str, call: int) -> Callable[[], None]:
    """A plant: the process dies when `holder.name` is called for the `call`-th time."""
    return _plant(holder, name, call, lambda real, args: None)


def kill_half_way(holder: Any, name: str, call: int) -> Callable[[], None]:
    """A plant: the process dies with half of the file written that `holder.name(content, path)` was to write."""

    def half(real: Callable[..., Any], args: tuple[Any, ...]) -> None:
        real(*args)
        path = Path(args[1])
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return _plant(holder, name, call, half)


def kill_after(holder: Any, name: str, call: int) -> Callable[[], None]:
    """A plant: the process dies when `holder.name` has returned for the `call`-th time."""
    return _plant(holder, name, call, lambda real, args: real(*args))


def _plant(holder: Any, name: str, call: int, last: Callable[[Any, Any], None]) -> Callable[[], None]:
    def plant() -> None:
        real, calls = getattr(holder, name), [0]

        def planted(*args: Any, **kwargs: Any) -> Any:
            calls[0] += 1
            if calls[0] == call:
                last(lambda *given: real(*given, **kwargs), args)
                os.kill(os.getpid(), signal.SIGKILL)
            return real(*args, **kwargs)

        setattr(holder, name, planted)

    return plant


GATE = gate_state.GateState
# Step 12 is the third validation, and the degraded one; checkpoints are of steps 2, 4, 6, …
PLACES = {
    "validating, file written": kill_after(AccuracyValidator, "__call__", 2),
    "validating the degraded": kill_before(AccuracyValidator, "__call__", 3),
    "saving, half of the weights": kill_half_way(checkpoint, "save_file", 3),
    "removing an old checkpoint": kill_before(checkpoint.shutil, "rmtree", 1),
    "judging": kill_before(GATE, "add", 1),
    "rolling back, decided": kill_before(GATE, "carry_out", 1),
    "rolling back, checkpoints away": kill_before(GATE, "_set_aside", 1),
    "rolling back, validations away": kill_after(GATE, "_set_aside", 1),
    "rolled back": kill_after(GATE, "add", 1),
}


def in_a_process(work: Callable[[], Any]) -> int:
    """Do it in a forked process; return the signal that ended it, 0 for none."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            work()
            code = 0
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    if os.WIFEXITED(status) and os.WEXITSTATUS(status):
        raise RuntimeError("the run failed")
    return os.WTERMSIG(status) if os.WIFSIGNALED(status) else 0


def interrupted(folder: Path, plant: Callable[[], None]) -> tuple[int, str]:
    """Run with the plant, then without it; the signal of the first, and the weights' hash at the end."""

    def planted() -> None:
        plant()
        spiked_run(folder)

    killed = in_a_process(planted)
    in_a_process(lambda: spiked_run(folder))
    leftovers = [*folder.rglob("*.part"), *folder.rglob("*.old")]
    if leftovers:
        raise RuntimeError(f"{leftovers[0]} was left")
    return killed, hashlib.sha256((folder / "model" / "model.safetensors").read_bytes()).hexdigest()


def main(folder: Path) -> None:
    gc.freeze()  # what is imported need not be looked through by every run
    found = {"undisturbed": interrupted(folder / "undisturbed", lambda: None)}
    for number, (place, plant) in enumerate(PLACES.items()):
        found[place] = interrupted(folder / str(number), plant)
    (folder / "found.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
