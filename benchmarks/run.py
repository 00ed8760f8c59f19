"""Running benchmarks: every case at every size, its contenders in turn, their memory in processes of their own."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from typing import Any

import torch

from neural_layers.benchmarks.case import Call, Case, Inputs, Limit, Size
from neural_layers.benchmarks.cases import cases_of
from neural_layers.benchmarks.contenders import Backends, backends, ours, prepare, skipped
from neural_layers.benchmarks.environment import describe_environment
from neural_layers.benchmarks.memory import SECONDS, MemoryServer, Peaks, cuda_peaks
from neural_layers.benchmarks.timing import EFFORTS, Timed, describe_failure, forward_backward, time_in_turns
from neural_layers.errors import InputError

FORMAT = 1  # of the results; raised when a reader of old ones would go wrong
Result = dict[str, Any]
Tell = Callable[[str], None]


def run_benchmarks(
    ops: Sequence[str], *, device: str = "cpu", effort: str = "full", threads: int = 1, tell: Tell = lambda text: None
) -> Iterator[Result]:
    """Measure ops one after the other; each result, as `<op>.json` holds it, comes as soon as it is there.

    ops:    names of `neural_layers.functional`
    device: cpu or cuda
    effort: quick (under three minutes for all ops) or full (an hour)
    tell:   is called with a line on what is being measured

    Raises InputError for an op without a benchmark, a device that is not there, fewer than one thread.
    """
    cases = {op: cases_of(op) for op in ops}
    if device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: torch sees no CUDA device here; use --device cpu")
    if threads < 1:
        raise InputError(f"--threads {threads} must be at least 1")
    return _measure(cases, device, effort, threads, tell)


def _measure(
    cases: dict[str, tuple[Case, ...]], device: str, effort: str, threads: int, tell: Tell
) -> Iterator[Result]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        with ExitStack() as stack:
            server = stack.enter_context(MemoryServer(threads)) if device == "cpu" else None
            runner = _Runner(device, effort, server, tell)
            for op, chosen in cases.items():
                # Described before each op, so that its load is that of what else the machine did.
                environment = describe_environment(device, threads)
                measured = [runner.case(case) for case in chosen if case.sizes(effort, device)]
                yield {"format": FORMAT, "op": op, "effort": effort, "environment": environment, "cases": measured}
    finally:
        torch.set_num_threads(before)


class _Runner:
    def __init__(self, device: str, effort: str, server: MemoryServer | None, tell: Tell) -> None:
        self.device, self.effort, self.server, self.tell = device, effort, server, tell

    def case(self, case: Case) -> Result:
        """One case over its sizes."""
        absent = {peer.name: peer.absence(self.device, self.effort) for peer in case.peers}
        peers = [name for name, reason in absent.items() if reason is None]
        sizes = case.sizes(self.effort, self.device)
        self.tell(f"{case.name}, loading")
        self._load(case, peers)
        rows, reasons, by_name_only, failed = [], dict[str, str](), dict[str, str](), dict[str, str]()
        for size in sizes:
            self.tell(f"{case.name}, {case.axis} {size[case.axis]}")
            try:
                inputs = case.inputs(size, self.device)
                found = backends(case, inputs, self.device)
            except Exception as error:
                failed[str(size[case.axis])] = describe_failure(error)
                continue
            reasons |= found.reasons
            by_name_only |= found.by_name_only
            rows.append({"size": dict(size), "auto": ours(found.auto), **self._row(case, size, inputs, found, peers)})
        return {
            "name": case.name,
            "about": case.about,
            "axis": case.axis,
            "constants": {letter: value for letter, value in sizes[0].items() if letter != case.axis},
            "dtype": str(case.dtypes[self.device]).removeprefix("torch."),
            "backward": bool(case.leaves),
            "rows": rows,
            "failed": failed,
            "backends": reasons,
            "by_name_only": by_name_only,
            "absent": {name: reason for name, reason in absent.items() if reason is not None},
            "calls": {peer.name: peer.call for peer in case.peers if absent[peer.name] is None},
            "limit": case.limit.name if case.limit else None,
        }

    def _load(self, case: Case, peers: list[str]) -> None:
        """Run everybody once at a tiny size: a first call at a real one is then not the one that loads libraries."""
        tiny = case.tiny[0]
        # What fails here fails again at the real sizes, and is told there.
        with suppress(Exception):
            inputs = case.inputs(tiny, self.device)
            for name in [*map(ours, backends(case, inputs, self.device).timed), *peers]:
                with suppress(Exception):
                    call = prepare(case, inputs, name)
                    if "failed" not in self._memory(case, tiny, name, call, bool(call.leaves)):
                        (forward_backward(call) if call.leaves else call.run)()

    def _row(self, case: Case, size: Size, inputs: Inputs, found: Backends, peers: list[str]) -> Result:
        contenders: dict[str, Result] = {}
        timed: list[Timed] = []
        untimed = case.untimed(size, self.effort)
        expected: torch.Tensor | None = None
        for name in [*map(ours, found.timed), *peers]:
            skip, skip_backward = skipped(case, name, size, self.effort)
            backward = bool(case.leaves) and skip_backward is None
            contender: Result = {"notes": [skip_backward] if skip_backward and case.leaves else []}
            contenders[name] = contender
            if skip is not None:
                contender["failed"] = skip
                continue
            try:
                call = prepare(case, inputs, name)
                contender["memory"] = self._memory(case, size, name, call, backward)
                # Who cannot be run once in a child process would take this one down.
                if "failed" in contender["memory"]:
                    contender["failed"] = contender.pop("memory")["failed"]
                    continue
                if untimed is not None:
                    continue
                clocks = {"forward": Timed(call, self.device, backward=False)}
                with torch.no_grad():
                    output = call.compare(clocks["forward"].warm_up())
            except Exception as error:
                contender["failed"] = describe_failure(error)
                continue
            expected = output if expected is None else expected
            contender["difference"] = _difference(output, expected)
            if not contender["difference"] <= case.largest_difference[self.device]:
                contender["failed"] = (
                    f"computes something else: differs by {contender['difference']:.1g} of the maximum"
                )
                continue
            if backward:
                clocks["both"] = Timed(call, self.device, backward=True)
            contender |= clocks
            timed += clocks.values()
        limit: Result = {}
        if case.limit is not None and untimed is None:
            timed += self._limit(limit, case.limit, inputs)
        time_in_turns(timed, EFFORTS[self.effort])
        for entry in [*contenders.values(), limit]:
            _read_off(entry)
        return {"contenders": contenders, "limit": limit, "untimed": untimed}

    def _memory(self, case: Case, size: Size, name: str, call: Call, backward: bool) -> Peaks:
        if case.no_memory:
            return {"unmeasured": case.no_memory}
        if self.server is None:
            return cuda_peaks(call, backward=backward)
        return self.server.peaks(case, size, name, backward=backward, seconds=SECONDS[self.effort])

    def _limit(self, entry: Result, limit: Limit, inputs: Inputs) -> list[Timed]:
        try:
            forward, both = limit.prepare(inputs)
        except Exception as error:
            entry["failed"] = describe_failure(error)
            return []
        clocks = {"forward": forward, "both": both}
        entry |= {m: Timed(Call(run), self.device, backward=False) for m, run in clocks.items() if run is not None}
        return list(entry.values())


def _read_off(entry: Result) -> None:
    """Replace clocks by what they read."""
    for mode in ("forward", "both"):
        timed = entry.pop(mode, None)
        if timed is None:
            continue
        if timed.failure:
            entry.setdefault("notes", []).append(f"{mode}: {timed.failure}")
            continue
        times = timed.times()
        entry[mode] = {
            "median": times.median, "lower": times.lower, "upper": times.upper, "count": times.count,
        }  # fmt: skip


def _difference(output: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest one, relative to the largest output."""
    if output.shape != expected.shape:
        return float("inf")
    largest = expected.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    return ((output.float() - expected.float()).abs().max() / largest).item()
