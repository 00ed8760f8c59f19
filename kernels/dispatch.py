"""Choosing the backend that runs an op, and saying why.

An op owns a tuple of `Backend`s ordered from the fastest to the slowest. Every backend's `run` and `obstacle` take
exactly the arguments of the op's public function, so that no argument can escape the check:

    _OP = Op("rms_norm", check=_check, backends=(
        Backend("torch", run=rms_norm_torch),
        Backend("reference", run=rms_norm_reference),
    ))

    def rms_norm(x, weight, eps=1e-6, *, backend="auto"):
        return _OP(backend, x, weight, eps)

Nothing here may break a graph: `torch.compile(fullgraph=True)` traces through `Op.__call__`.
"""

import inspect
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch


class BackendError(RuntimeError):
    """A backend was named that does not exist or that cannot run the call; the message tells which and why."""


class SlowBackendWarning(UserWarning):
    """A much slower backend runs because the fast ones cannot; given once for each op and backend."""


def no_obstacle(*args: Any, **kwargs: Any) -> None:
    """The obstacle of a backend that can run everything."""


@dataclass(frozen=True)
class Backend:
    """One way to run an op.

    name:     `reference`, `torch`, `native`, `triton`, or the name of the library that serves (`sdpa`, …)
    run:      the implementation
    obstacle: the reason in words why `run` cannot take these arguments, or None where it can. It must not put a
              tensor's size into the text, because under `torch.compile` that would freeze the size.
    avoid:    the reason in words why `auto` passes this backend over although it could run, or None; same rules
    slow:     "" or, where `auto` should warn before it falls this far, how much slower this backend is
    missing:  the obstacle that means an incomplete installation: `auto` warns once, for all ops alike, when it meets it
    describe: what `explain` says of the backend beside its name, such as the instruction set it uses
    """

    name: str
    run: Callable[..., Any]
    obstacle: Callable[..., str | None] = no_obstacle
    avoid: Callable[..., str | None] = no_obstacle
    slow: str = ""
    missing: str = ""
    describe: Callable[[], str] = str


@dataclass(frozen=True)
class Explanation:
    """What `explain` found: the chosen backend and, for each other one, why not."""

    op: str
    backend: str
    reasons: dict[str, str]
    detail: str = ""

    def __str__(self) -> str:
        width = max(map(len, [self.backend, *self.reasons]))
        chosen = f"chosen ({self.detail})" if self.detail else "chosen"
        lines = [f"{self.op}: backend {self.backend!r}", f"  {self.backend:<{width}}  {chosen}"]
        lines += [f"  {name:<{width}}  {reason}" for name, reason in self.reasons.items()]
        return "\n".join(lines)


OPS: dict[str, "Op"] = {}
# A plain dict and not a ContextVar: torch.compile guards on the dict's contents, and cannot trace ContextVar.get.
_forced: dict[str, str] = {}
_warned: set[str] = set()


class Op:
    """An op's backends, fastest first, with the argument check that they share."""

    def __init__(self, name: str, *, check: Callable[..., None], backends: tuple[Backend, ...]) -> None:
        self.name, self.check, self.backends = name, check, backends
        OPS[name] = self

    def __call__(self, requested: str, *args: Any, **kwargs: Any) -> Any:
        self.check(*args, **kwargs)
        backend = self.choose(requested, *args, **kwargs)
        fell = backend is not self.backends[0] and requested == "auto" and self.name not in _forced
        if fell and not torch.compiler.is_compiling():
            self._warn_once(backend, *args, **kwargs)
        return backend.run(*args, **kwargs)

    def choose(self, requested: str, *args: Any, **kwargs: Any) -> Backend:
        """The backend for these arguments; raises BackendError where the requested one cannot run them."""
        if requested == "auto":
            requested = _forced.get(self.name, "auto")
        if requested == "auto":
            for backend in self.backends:
                if backend.obstacle(*args, **kwargs) is None and backend.avoid(*args, **kwargs) is None:
                    return backend
            raise BackendError(f"no backend of {self.name} can run this call: {self._reasons(*args, **kwargs)}")
        backend = self.named(requested)
        reason = backend.obstacle(*args, **kwargs)
        if reason is not None:
            raise BackendError(f"backend {requested!r} of {self.name} cannot run: {reason}")
        return backend

    def named(self, name: str) -> Backend:
        """The backend of that name; raises BackendError with the names there are."""
        for backend in self.backends:
            if backend.name == name:
                return backend
        known = ", ".join(repr(backend.name) for backend in self.backends)
        raise BackendError(f"{self.name} has no backend {name!r}; it has 'auto', {known}")

    def explain(self, requested: str, *args: Any, **kwargs: Any) -> Explanation:
        """The choice for these arguments and the reason against each other backend."""
        self.check(*args, **kwargs)
        chosen = self.choose(requested, *args, **kwargs)
        forced = requested != "auto" or self.name in _forced
        reasons = {}
        for backend in self.backends:
            if backend is not chosen:
                reasons[backend.name] = backend.obstacle(*args, **kwargs) or "could run; " + (
                    f"{chosen.name!r} was asked for" if forced else backend.avoid(*args, **kwargs) or "slower here"
                )
        return Explanation(self.name, chosen.name, reasons, chosen.describe())

    def _reasons(self, *args: Any, **kwargs: Any) -> str:
        return "; ".join(f"{b.name}: {b.obstacle(*args, **kwargs)}" for b in self.backends)

    def _warn_once(self, chosen: Backend, *args: Any, **kwargs: Any) -> None:
        faster = self.backends[: self.backends.index(chosen)]
        for backend in faster:
            if backend.missing and backend.obstacle(*args, **kwargs) == backend.missing:
                _warn(backend.missing)
        if chosen.slow:
            reasons = "; ".join(f"{b.name!r} cannot: {b.obstacle(*args, **kwargs)}" for b in faster)
            _warn(f"{self.name} runs on backend {chosen.name!r}, {chosen.slow}: ", reasons)


def _warn(message: str, reasons: str = "") -> None:
    if message not in _warned:
        _warned.add(message)
        warnings.warn(message + reasons, SlowBackendWarning, stacklevel=5)


def explain(op: str, *args: Any, **kwargs: Any) -> Explanation:
    """Tell which backend would run `op(*args, **kwargs)`, and the reason against each other one.

    op: a name of `neural_layers.functional`; the arguments are those of that function, `backend` included.
    Raises ValueError for an op that does not exist, TypeError for arguments that the op does not take, and whatever
    the op itself raises for them.
    """
    if op not in OPS:
        raise ValueError(f"there is no op {op!r}; there are {', '.join(sorted(OPS))}")
    requested = kwargs.pop("backend", "auto")
    signature = inspect.signature(OPS[op].backends[-1].run)
    bound = signature.bind(*args, **kwargs)
    bound.apply_defaults()
    return OPS[op].explain(requested, *bound.args, **bound.kwargs)


@contextmanager
def use_backend(**choices: str) -> Iterator[None]:
    """Force backends by op name within a `with` block, for every call that leaves `backend="auto"`.

        with use_backend(selective_scan="reference"):
            model(x)

    The choice holds for the whole process, not for one thread. Raises ValueError for an unknown op and BackendError
    for a backend that the op does not have.
    """
    for op, name in choices.items():
        if op not in OPS:
            raise ValueError(f"there is no op {op!r}; there are {', '.join(sorted(OPS))}")
        if name != "auto":
            OPS[op].named(name)
    before = dict(_forced)
    _forced.update(choices)
    try:
        yield
    finally:
        _forced.clear()
        _forced.update(before)
