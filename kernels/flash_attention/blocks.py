"""Which keys a query sees: the rule itself, and the blocks of queries and keys that hold a visible pair.

Dimension letters: B batch, T query length, S key length.
"""

import functools
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from neural_layers.kernels.arguments import document_numbers


@dataclass(frozen=True)
class Visibility:
    """The rule. Query t stands at key position t + S − T, so that the last query stands at the last key.

    It sees key position j where every part that is set agrees:
    causal: j ≤ i;  window w: i − w < j and, without causal, j < i + w;
    key_padding_mask (B, S): its j-th element;  seq_idx (B, S): the id is the same from i to j.
    """

    T: int
    S: int
    causal: bool
    window: int | None
    key_padding_mask: Tensor | None
    seq_idx: Tensor | None

    def __post_init__(self) -> None:
        if self.seq_idx is not None:  # numbered anew, so that two ids can be compared without looking in between
            object.__setattr__(self, "seq_idx", document_numbers(self.seq_idx))

    @property
    def effective_window(self) -> int | None:
        """The window, or None where it is so long that it hides nothing."""
        return None if self.window is None or self.window >= max(self.T, self.S) else self.window

    def without_positions(self) -> "Visibility":
        """The rule without causal and window: what remains for a block that these two allow in full."""
        return replace(self, causal=False, window=None)

    def allowed(self, t0: int, t1: int, s0: int, s1: int, device: torch.device) -> Tensor | None:
        """What queries t0…t1 see of keys s0…s1: bool that broadcasts to (B, t1 − t0, s1 − s0), or None for all."""
        parts: list[Tensor] = []
        if self.causal or self.effective_window is not None:
            query_1T1 = torch.arange(t0, t1, device=device).view(1, -1, 1) + (self.S - self.T)
            parts += self._positions(query_1T1, torch.arange(s0, s1, device=device))
        if self.key_padding_mask is not None:
            parts.append(self.key_padding_mask[:, s0:s1].unsqueeze(1))
        if self.seq_idx is not None:
            start = self.S - self.T
            query_BT1 = self.seq_idx[:, start + t0 : start + t1].unsqueeze(-1)
            parts.append(query_BT1 == self.seq_idx[:, s0:s1].unsqueeze(1))
        return functools.reduce(torch.logical_and, parts) if parts else None

    def _positions(self, query: Tensor, key: Tensor) -> list[Tensor]:
        parts = [key <= query] if self.causal else []
        if self.effective_window is not None:
            parts.append(key > query - self.effective_window)
            if not self.causal:
                parts.append(key < query + self.effective_window)
        return parts


@dataclass(frozen=True)
class Block:
    """Queries t0…t1 against keys s0…s1; `full` where causal and window hide no pair of it."""

    t0: int
    t1: int
    s0: int
    s1: int
    full: bool


def key_blocks(rule: Visibility, t0: int, t1: int, chunk: int) -> Iterator[Block]:
    """The blocks of keys that causal and window let some query of t0…t1 see, in order.

    They lie at multiples of `chunk`, so that forward and backward, whatever their order, meet the same blocks.
    """
    first, last = t0 + rule.S - rule.T, t1 - 1 + rule.S - rule.T  # positions of the first and the last query
    window = rule.effective_window
    low = 0 if window is None else max(0, first - window + 1)
    high = rule.S
    if rule.causal:
        high = min(high, last + 1)
    elif window is not None:
        high = min(high, last + window)
    for s0 in range(low // chunk * chunk, high, chunk):
        s1 = min(s0 + chunk, rule.S)
        full = not rule.causal or s1 - 1 <= first
        if window is not None:
            full = full and s0 > last - window and (rule.causal or s1 - 1 < first + window)
        yield Block(t0, t1, s0, s1, full)
