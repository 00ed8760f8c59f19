"""Who takes part at a size: our backends, and the peers that are installed."""

from dataclasses import dataclass

import neural_layers
import neural_layers.functional as F
from neural_layers.benchmarks.case import NOT_TIMED, OURS, Call, Case, Inputs, Size
from neural_layers.kernels.dispatch import BackendError


@dataclass(frozen=True)
class Backends:
    """What `neural_layers.explain` says of an op's backends: the one that `auto` takes, the reason against each that is
    not timed, and of those that are timed, why `auto` would never take them."""

    auto: str
    timed: tuple[str, ...]
    reasons: dict[str, str]
    by_name_only: dict[str, str]


def backends(case: Case, inputs: Inputs, device: str) -> Backends:
    """Which of the op's backends can run these arguments; or which of a case's own contenders."""
    if case.ours:
        absent = {peer.name: peer.absence(device, "full") for peer in case.ours}
        present = tuple(name for name, reason in absent.items() if reason is None)
        return Backends(present[0], present, {name: why for name, why in absent.items() if why is not None}, {})
    explanation = neural_layers.explain(case.op, **inputs)
    timed, reasons = [], {}
    for name in (explanation.backend, *explanation.reasons):
        reason = _reason_against(case, inputs, name, device)
        if reason is None:
            timed.append(name)
        else:
            reasons[name] = reason
    by_name_only = {name: why for name, why in explanation.reasons.items() if name in timed and why[:9] != "could run"}
    return Backends(explanation.backend, tuple(timed), reasons, by_name_only)


def _reason_against(case: Case, inputs: Inputs, name: str, device: str) -> str | None:
    if name in NOT_TIMED:
        return "the definition, which is written to be read"
    if name == "triton" and device == "cpu":
        return "runs on a GPU; on the CPU only in Triton's interpreter, which is for tests"
    try:
        neural_layers.explain(case.op, **inputs, backend=name)
    except BackendError as error:
        return str(error).removeprefix(f"backend {name!r} of {case.op} cannot run: ")
    return None


def ours(backend: str) -> str:
    """The name of one of our backends among the contenders."""
    return f"{OURS} {backend}"


def prepare(case: Case, inputs: Inputs, name: str) -> Call:
    """The call of a contender; raises whatever its library raises."""
    if name.startswith(OURS):
        backend = name.removeprefix(f"{OURS} ")
        if case.ours:
            return next(peer for peer in case.ours if peer.name == backend).prepare(inputs)
        op = getattr(F, case.op)
        leaves = tuple(inputs[leaf] for leaf in case.leaves)
        return Call(lambda: op(**inputs, backend=backend), leaves, case.compare)
    return next(peer for peer in case.peers if peer.name == name).prepare(inputs)


def skipped(case: Case, name: str, size: Size, effort: str) -> tuple[str | None, str | None]:
    """Why a contender does not run at a size, and why it does not run backward there."""
    if name.startswith(OURS):
        return None, None
    peer = next(peer for peer in case.peers if peer.name == name)
    return peer.skip(size, effort), peer.skip_backward(size, effort)
