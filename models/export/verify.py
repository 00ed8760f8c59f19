"""Comparing an exported graph with the model it was made of, before its file takes its name.

Letters: B batch, T length, P tokens before, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from neural_layers.models.export.recurrent import CHUNK
from neural_layers.models.export.reference import Tolerance
from neural_layers.models.export.session import PAST, OnnxState, StateSession
from neural_layers.models.export.state import StateTensor

BEFORE = 7  # tokens of the state that continuations start from: neither a chunk nor a window


class VerificationError(ValueError):
    """The graph computes something else than the model; the message says which output, at which length, by how much."""


@dataclass(frozen=True)
class Check:
    """What was compared: T new tokens behind P, B rows of which all but the first have padding on the left, and the
    error of the output that is worst, as the `Tolerance` measures it."""

    length: int
    past: int
    batch: int
    error: float


def lengths(context: int, windows: Sequence[int]) -> list[int]:
    """1, 2, the chunk with its neighbours, twice the chunk, and past every window; or as much of each as the context
    allows."""
    wanted = [1, 2, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, *(window + 3 for window in windows)]
    longest = max(context - BEFORE, 1)
    return sorted({min(length, longest) for length in wanted})


def verify_hybrid(
    model: Any,
    allowed: Tolerance,
    session: StateSession,
    tensors: Sequence[StateTensor],
    tell: Callable[[Check], None] = lambda check: None,
) -> list[Check]:
    """Compare logits and states at each of `lengths`, with and without a state before, for 1 row and 3 with padding.

    Raises VerificationError at the first output that differs by more than `allowed`.
    """
    windows = sorted({tensor.window for tensor in tensors if tensor.window is not None})
    checks = []
    for length in lengths(model.config.max_position_embeddings, windows):
        for batch in (1, 3):
            past = BEFORE if length + BEFORE <= model.config.max_position_embeddings else 0
            for before in dict.fromkeys((0, past)):
                check = _compare(model, session, tensors, Check(length, before, batch, 0.0), allowed)
                tell(check)
                checks.append(check)
    return checks


@torch.no_grad()
def _compare(
    model: Any, session: StateSession, tensors: Sequence[StateTensor], case: Check, allowed: Tolerance
) -> Check:
    from neural_layers.models.hybrid import HybridCache

    cache, state = HybridCache(model.config), session.start(case.batch)
    total = case.past + case.length
    ids = torch.randint(model.config.vocab_size, (case.batch, total), generator=torch.Generator().manual_seed(total))
    mask = _padded_mask(case.batch, total)
    worst = 0.0
    for begin, end in ((0, case.past), (case.past, total)):
        if begin == end:
            continue
        kept = mask[:, begin:end]
        position = (mask[:, :end].cumsum(1) - 1).clamp_min(0)[:, begin:]
        expected = model(ids[:, begin:end], attention_mask=mask[:, :end], position_ids=position, past_key_values=cache)
        logits, state = session.run(ids[:, begin:end].numpy(), kept.numpy(), state, end - begin)
        # States first, layer after layer: the first that differs tells where the fault is.
        outputs = ("logits", logits, expected.logits.float().cpu().numpy(), kept.numpy())
        for name, found, wanted, counts in (*_states(tensors, state, cache), outputs):
            where = f"at length {end - begin}, {begin} tokens before it, batch {case.batch}"
            worst = max(worst, check_equal(name, found, wanted, counts, allowed, where))
    return Check(case.length, case.past, case.batch, worst)


def _padded_mask(batch: int, total: int) -> Tensor:
    """Row i has 2·i tokens of padding on the left, as far as one real token remains."""
    mask = torch.ones(batch, total, dtype=torch.long)
    for row in range(batch):
        mask[row, : min(2 * row, total - 1)] = 0
    return mask


def _states(
    tensors: Sequence[StateTensor], state: OnnxState, cache: Any
) -> Iterator[tuple[str, np.ndarray, np.ndarray, np.ndarray | None]]:
    """Name, value in the graph, value in the model's cache, and which entries count."""
    for tensor in tensors:
        layer, found = cache.layers[tensor.layer], state.tensors[PAST + tensor.name].numpy()
        counts = None
        if tensor.kind in ("keys", "values"):
            wanted = getattr(layer, tensor.kind)
            found, wanted = found.swapaxes(1, 2), wanted.transpose(1, 2)
            counts = state.mask[:, state.mask.shape[1] - wanted.shape[1] :]
        elif tensor.kind == "conv":
            wanted = layer._conv_state
        else:
            wanted = layer._recurrent_state.mT  # (B, E, N), and (B, H, P, N)
            found = found.reshape(wanted.shape)
        yield f"the {tensor.kind} of layer {tensor.layer}", found, wanted.float().cpu().numpy(), counts


def check_equal(
    name: str, found: np.ndarray, wanted: np.ndarray, counts: np.ndarray | None, allowed: Tolerance, where: str
) -> float:
    """The error of an output where `counts` (B, T) is 1; raises VerificationError where it is not within tolerance."""
    if found.shape != wanted.shape:
        raise VerificationError(f"{name} has shape {found.shape} and not PyTorch's {wanted.shape} {where}")
    if counts is not None:
        found, wanted = found[counts == 1], wanted[counts == 1]
    if not wanted.size:
        return 0.0
    measure = _mean_square if allowed.is_mean else _largest
    error = measure(found - wanted) / max(measure(wanted), 1e-30)
    if not error <= allowed.limit:  # NaN is not
        raise VerificationError(
            f"{name} differs from PyTorch by {error:.2g} of its size (allowed: {allowed.limit:g}) {where}"
        )
    return error


def _largest(values: np.ndarray) -> float:
    return float(np.abs(values).max())


def _mean_square(values: np.ndarray) -> float:
    return float(np.sqrt(np.square(values, dtype=np.float64).mean()))
