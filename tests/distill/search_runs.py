"""A recipe of arithmetic for tests of the search: it validates four times and takes no time."""

import math
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from neural_layers.distill.search import Option, Search, SearchedRecipe, SearchOptions
from neural_layers.distill.search.recipe import measured_language_model
from neural_layers.errors import InputError

OPTIONS = {
    "lr": Option("--lr", "float"),
    "layers": Option("--layers", "int"),
    "width": Option("--width", "int"),
    "heads": Option("--heads", "int"),
    "mixers": Option("--mixers", "text"),
    "bf16": Option("--bf16", "switch"),
    "steps": Option("--num-iterations", "int", ("--steps",)),
}
SPACE = ("lr=1e-5..1e-1:log", "layers=1..8", "width=32|48|64", "heads=2|3|4", "mixers=mamba|mamba,attention")


def parse(arguments: Sequence[str]) -> dict[str, str]:
    """`--name=value` and `--name value`, as a dictionary."""
    found, rest = {}, list(arguments)
    while rest:
        flag, equals, value = rest.pop(0).partition("=")
        if flag.lstrip("-") not in {*(o.flag[2:] for o in OPTIONS.values()), "out", "bad"}:
            raise InputError(f"unrecognized arguments: {flag}")
        found[flag[2:]] = value if equals else "true" if flag == "--bf16" else rest.pop(0)
    return found


class FakeRecipe:
    """Counts its runs; what happens at a trial can be set: `at` maps its number to a function that is called midway."""

    def __init__(self, at: dict[int, Callable[[], Any]] | None = None) -> None:
        self.at, self.ran = at or {}, list[int]()

    def run(self, options: dict[str, str], command: str, callbacks: Sequence[Any]) -> dict[str, Any]:
        """A loss that falls with the steps, best at lr = 2e-3 and large models; heads must divide the width."""
        number = int(Path(options["out"]).name)
        self.ran.append(number)
        off = abs(math.log10(float(options.get("lr", 2e-3)) / 2e-3))
        layers, width, heads = (int(options.get(name, 4)) for name in ("layers", "width", "heads"))
        if width % heads:
            raise InputError(f"--width {width} must be a multiple of --heads {heads}")
        loss = 1.0
        for step in (0, 25, 50, 75, 100):
            loss = 1 + off / 2 + 1 / layers + (1 + off) * (100 - step) / 50
            state: Any = SimpleNamespace(global_step=step, max_steps=100)
            for callback in callbacks:
                if step:
                    callback.on_evaluate(None, state, None, metrics={"eval_loss": loss})
                else:
                    callback.on_train_begin(None, state, None)
            if step == 50 and number in self.at:
                self.at.pop(number)()
        print(f"done {number}")
        return {"validation": {"loss": loss}, "parameters": 12 * layers * width**2, "seconds": 1.0}


def recipe(fake: FakeRecipe | None = None) -> SearchedRecipe:
    """The recipe as a search takes it."""
    run = (fake or FakeRecipe()).run
    costs = {"parameters": "min", "seconds": "min"}
    return SearchedRecipe(("fake",), OPTIONS, {"loss": "min"}, costs, "loss", parse, run, measured_language_model)


def search(folder: Path, trials: int = 12, fake: FakeRecipe | None = None, **changes: Any) -> Search:
    """A search in `folder`."""
    given: dict[str, Any] = {"parameters": SPACE, "prune_after": 2, **changes}
    return Search(SearchOptions(folder, trials, **given), recipe(fake))


def kill() -> None:
    """End this process as the out-of-memory killer does."""
    os.kill(os.getpid(), signal.SIGKILL)


def in_child(function: Callable[[], Any]) -> int:
    """Start a child process that calls the function; its number. `os.waitpid` waits for it."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        os.dup2(1, 2)
        function()
        status = 0
    finally:
        os._exit(status)


def tried(found: Search) -> list[tuple[str, dict[str, Any], Any, dict[int, float]]]:
    """State, parameters, values and validations of every trial."""
    from neural_layers.distill.search.study import state_of

    return [(state_of(t), t.params, t.values, t.intermediate_values) for t in found.study.get_trials()]
