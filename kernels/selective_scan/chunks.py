"""The arithmetic of one chunk of the selective scan, shared by the forward and the backward pass.

Dimension letters: B batch, T length, E inner width, N state size, C chunk. Work tensors put time first and E last:
a step is then one contiguous block, and every product runs along E without gaps.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
import torch.nn.functional
from torch import Tensor

from neural_layers.kernels.arguments import accumulation_dtype
from neural_layers.kernels.selective_scan_step.reference import SOFTPLUS_THRESHOLD

# Measured at E = 1536, N = 16: 8, 16 and 32 steps are equally fast, and the more steps, the fewer states are kept; with
# 32 those take half the memory of u in float32.
CHUNK = 32


@dataclass
class Chunk:
    """The inputs of some steps in the accumulation dtype, and what the recurrence made of them."""

    borders: list[Tensor | None]  # for each step (B, 1, 1), true in the rows where a document begins
    u_CBE: Tensor
    raw_CBE: Tensor  # delta with its bias, before softplus
    delta_CBE: Tensor
    B_CBN: Tensor
    C_CBN: Tensor
    z_CBE: Tensor | None
    decay_CBNE: Tensor
    states_CBNE: Tensor  # one more than steps: the state before the chunk comes first


def times(left: Tensor, right: Tensor) -> Tensor:
    """A matrix product for each step and row."""
    product = torch.bmm(left.flatten(0, 1), right.flatten(0, 1))
    return product.view(*left.shape[:2], *product.shape[1:])


@dataclass
class Scan:
    """The arguments of a scan, cut into chunks."""

    u: Tensor
    delta: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    delta_bias: Tensor | None
    initial_state: Tensor | None
    seq_idx: Tensor | None
    delta_softplus: bool
    dtype: torch.dtype = field(init=False)

    def __post_init__(self) -> None:
        self.dtype = accumulation_dtype(
            self.u, self.delta, self.A, self.B, self.C, self.D, self.z, self.delta_bias, self.initial_state
        )
        self.A_NE = self.A.to(self.dtype).t().contiguous()
        self.D_E = None if self.D is None else self.D.to(self.dtype)
        self.bias_E = None if self.delta_bias is None else self.delta_bias.to(self.dtype)
        self.borders = self._borders()
        steps = min(CHUNK, self.u.shape[1])
        self.decay_CBNE, self.states_CBNE = self.work(steps), self.work(steps + 1)

    def work(self, steps: int) -> Tensor:
        """An uninitialised (C, B, N, E)."""
        return torch.empty(steps, self.u.shape[0], *self.A_NE.shape, dtype=self.dtype, device=self.u.device)

    def new_state(self, state_BEN: Tensor | None) -> Tensor:
        """A new (B, N, E) with the values of a state or of its gradient, zeros for None."""
        state_BNE = self.work(1)[0]
        return state_BNE.zero_() if state_BEN is None else state_BNE.copy_(state_BEN.transpose(1, 2))

    def _borders(self) -> list[Tensor | None]:
        length = self.u.shape[1]
        if self.seq_idx is None or length < 2:
            return [None] * length
        begins_BT = self.seq_idx[:, 1:] != self.seq_idx[:, :-1]
        anywhere = begins_BT.any(dim=0).tolist()
        rows = begins_BT.t().reshape(length - 1, self.u.shape[0], 1, 1).unbind(0)
        return [None, *(row if here else None for row, here in zip(rows, anywhere, strict=True))]

    def spans(self) -> Iterator[tuple[int, int]]:
        """The bounds of each chunk."""
        length = self.u.shape[1]
        return ((t, min(t + CHUNK, length)) for t in range(0, length, CHUNK))

    def load(self, x: Tensor, t0: int, t1: int) -> Tensor:
        """Steps t0…t1 of (B, T, …) as contiguous (C, B, …)."""
        return x[:, t0:t1].transpose(0, 1).to(self.dtype).contiguous()

    def run(self, t0: int, t1: int, state_BNE: Tensor) -> Chunk:
        """Steps t0…t1 from the state before them. The work tensors are valid until the next call."""
        u_CBE, B_CBN, C_CBN = (self.load(x, t0, t1) for x in (self.u, self.B, self.C))
        raw_CBE = self.load(self.delta, t0, t1)
        if self.bias_E is not None:
            raw_CBE = raw_CBE + self.bias_E
        delta_CBE = raw_CBE
        if self.delta_softplus:
            delta_CBE = torch.nn.functional.softplus(raw_CBE, threshold=SOFTPLUS_THRESHOLD)
        z_CBE = None if self.z is None else self.load(self.z, t0, t1)

        decay_CBNE = torch.mul(delta_CBE.unsqueeze(2), self.A_NE, out=self.decay_CBNE[: t1 - t0]).exp_()
        states_CBNE = self.states_CBNE[: t1 - t0 + 1]
        states_CBNE[0].copy_(state_BNE)
        torch.mul((delta_CBE * u_CBE).unsqueeze(2), B_CBN.unsqueeze(3), out=states_CBNE[1:])
        borders = self.borders[t0:t1]
        previous, *states = states_CBNE.unbind(0)
        for decay, state, border in zip(decay_CBNE.unbind(0), states, borders, strict=True):
            # A fill, not a product with 0: the document before may have left NaN or inf.
            state.addcmul_(decay, previous if border is None else previous.masked_fill(border, 0))
            previous = state
        return Chunk(borders, u_CBE, raw_CBE, delta_CBE, B_CBN, C_CBN, z_CBE, decay_CBNE, states_CBNE)

    def ungated(self, chunk: Chunk) -> Tensor:
        """C·h + D u, (C, B, E)."""
        y_CBE = times(chunk.C_CBN.unsqueeze(2), chunk.states_CBNE[1:]).squeeze(2)
        return y_CBE if self.D_E is None else y_CBE.addcmul_(chunk.u_CBE, self.D_E)
