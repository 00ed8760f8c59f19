"""What the forward and the backward pass of the Mamba-2 scan share: the cut into spans, and the decays within one.

Dimension letters: B batch, T length, C tokens of a span, G groups, R heads of a group, H = G·R, P head width,
N state size.
"""

import math
from bisect import bisect_left
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional
from torch import Tensor

from neural_layers.kernels.arguments import accumulation_dtype
from neural_layers.kernels.selective_scan_step.reference import SOFTPLUS_THRESHOLD

# Smaller decays than e^LOWEST are taken for it. They count for nothing either way, but below e⁻⁸⁷ the float32 exp of a
# CPU leaves its vector path, and what it returns is denormal and slows every product.
LOWEST = {torch.float32: -80.0, torch.float64: -700.0}

# Bytes of states that a CPU works on together.
CACHE = 1 << 20


@dataclass(frozen=True)
class Span:
    """Tokens that are multiplied with one another: of one document, in one row or in some."""

    rows: slice
    time: slice
    begins: bool = False  # a document begins here, with a state of zero
    first_row: int = 0  # of the block of rows

    @property
    def in_block(self) -> slice:
        """The rows, counted from the first of the block."""
        return slice(self.rows.start - self.first_row, self.rows.stop - self.first_row)

    @property
    def length(self) -> int:
        return self.time.stop - self.time.start

    def tokens(self) -> "list[Span]":
        """The span in spans of one token."""
        starts = range(self.time.start, self.time.stop)
        return [Span(self.rows, slice(t, t + 1), self.begins and t == self.time.start, self.first_row) for t in starts]


class Work:
    """Memory by name that every span uses anew: fresh pages can cost more than the arithmetic on them."""

    def __init__(self, like: Tensor, dtype: torch.dtype) -> None:
        self.like, self.dtype = like, dtype
        self._memory: dict[str, Tensor] = {}

    def __call__(self, name: str, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        """An uninitialised tensor, valid until the name is asked for again."""
        size = math.prod(shape)
        if name not in self._memory or self._memory[name].shape[0] < size:
            self._memory[name] = self.like.new_empty(size, dtype=dtype or self.dtype)
        return self._memory[name][:size].view(shape)

    def times(self, name: str, left: Tensor, right: Tensor) -> Tensor:
        """The matrix products left @ right; both have the same leading dimensions."""
        leading, shape = left.shape[:-2], (left.shape[-2], right.shape[-1])
        out = self(name, math.prod(leading), *shape)
        torch.bmm(left.flatten(0, -3), right.flatten(0, -3), out=out)
        return out.view(*leading, *shape)

    def dot(self, left: Tensor, right: Tensor) -> Tensor:
        """Σ left right over the last dimension."""
        return torch.mul(left, right, out=self("dot", *left.shape)).sum(dim=-1)


@dataclass
class Chunk:
    """The inputs of a span in the accumulation dtype and its decays, with s_t the sum of Δ A up to token t.

    Valid until the next one is loaded. What only some need is computed when it is asked for.
    """

    work: Work
    x_BGCRP: Tensor
    delta_BGRC: Tensor
    logs_BGRC: Tensor  # s_t in float64
    B_BGCN: Tensor
    C_BGCN: Tensor

    def _exp(self, logs: Tensor) -> Tensor:
        return logs.clamp_(min=LOWEST[self.work.dtype]).exp_()

    @cached_property
    def from_start_BGRC(self) -> Tensor:
        """e^{s_t}, the decay of the state before the span."""
        return self._exp(self.logs_BGRC.to(self.work.dtype, copy=True))

    @cached_property
    def to_end_BGRC(self) -> Tensor:
        """e^{s_end − s_t}."""
        return self._exp((self.logs_BGRC[..., -1:] - self.logs_BGRC).to(self.work.dtype))

    @cached_property
    def decay_BGRCC(self) -> Tensor:
        """e^{s_t − s_s}, one where s lies after t."""
        shape = (*self.logs_BGRC.shape, self.logs_BGRC.shape[-1])
        logs_BGRCC = self.work("float64", *shape, dtype=torch.float64)
        torch.sub(self.logs_BGRC.unsqueeze(-1), self.logs_BGRC.unsqueeze(-2), out=logs_BGRCC)
        # Masked before the exponential, which would overflow where s lies after t.
        return self._exp(self.work("decay", *shape).copy_(logs_BGRCC).tril_())

    @cached_property
    def scores_BGCC(self) -> Tensor:
        """C_t·B_s, zero where s lies after t."""
        return (self.C_BGCN @ self.B_BGCN.mT).tril_()

    @cached_property
    def weights_BGRCC(self) -> Tensor:
        """e^{s_t − s_s} C_t·B_s, zero where s lies after t."""
        out = self.work("weights", *self.decay_BGRCC.shape)
        return torch.mul(self.decay_BGRCC, self.scores_BGCC.unsqueeze(2), out=out)

    @cached_property
    def drive_BGCRP(self) -> Tensor:
        """Δ x."""
        return torch.mul(self.x_BGCRP, by_token(self.delta_BGRC), out=self.work("drive", *self.x_BGCRP.shape))

    @cached_property
    def driven_BGCRP(self) -> Tensor:
        """e^{s_end − s_t} Δ x, which times B is what a token adds to the state after the span."""
        factor_BGCR1 = by_token(self.delta_BGRC * self.to_end_BGRC)
        return torch.mul(self.x_BGCRP, factor_BGCR1, out=self.work("driven", *self.x_BGCRP.shape))

    def within(self) -> Tensor:
        """What the tokens say to one another, Σ_{s ≤ t} e^{s_t − s_s} (C_t·B_s) Δ_s x_s, (B, G, R, C, P)."""
        return self.work.times("within", self.weights_BGRCC, self.drive_BGCRP.transpose(2, 3))

    def through_state(self, name: str, vectors_BGCN: Tensor, state_BHPN: Tensor) -> Tensor:
        """The state times a vector for each token, (B, G, C, R, P)."""
        product_BGCU = self.work.times(name, vectors_BGCN, by_group(state_BHPN, vectors_BGCN.shape[1]).mT)
        return product_BGCU.unflatten(-1, self.x_BGCRP.shape[-2:])

    def decay_and_add(self, before_BHPN: Tensor, after_BHPN: Tensor, left_BGCRP: Tensor, right_BGCN: Tensor) -> None:
        """after = e^{s_end} before + leftᵀ right, summed over the tokens; before and after may be one tensor."""
        torch.mul(before_BHPN, self.from_start_BGRC[..., -1].flatten(1)[..., None, None], out=after_BHPN)
        left_JUC = left_BGCRP.flatten(3).flatten(0, 1).mT
        after_BHPN.view(*left_JUC.shape[:2], after_BHPN.shape[-1]).baddbmm_(left_JUC, right_BGCN.flatten(0, 1))

    def advance(self, before_BHPN: Tensor, after_BHPN: Tensor) -> None:
        """Write the state after the span, given the one before."""
        self.decay_and_add(before_BHPN, after_BHPN, self.driven_BGCRP, self.B_BGCN)


def by_token(x_BGRC: Tensor) -> Tensor:
    """A factor of (B, G, C, R, P)."""
    return x_BGRC.mT.unsqueeze(-1)


def by_group(state_BHPN: Tensor, groups: int) -> Tensor:
    """(B, G, U, N) with U = R·P."""
    return state_BHPN.unflatten(1, (groups, -1)).flatten(2, 3)


@dataclass
class Scan:
    """The arguments of a scan, cut into chunks."""

    x: Tensor
    dt: Tensor
    A: Tensor
    B: Tensor
    C: Tensor
    D: Tensor | None
    z: Tensor | None
    dt_bias: Tensor | None
    initial_state: Tensor | None
    seq_idx: Tensor | None
    dt_softplus: bool
    chunk_size: int

    def __post_init__(self) -> None:
        self.dtype = accumulation_dtype(
            self.x, self.dt, self.A, self.B, self.C, self.D, self.z, self.dt_bias, self.initial_state
        )
        self.groups, self.work = self.B.shape[2], Work(self.x, self.dtype)
        self.x_BGTRP, self.z_BGTRP = self.split(self.x), None if self.z is None else self.split(self.z)
        self.B_BGTN, self.C_BGTN = (x.transpose(1, 2).to(self.dtype) for x in (self.B, self.C))
        self.A_GR1 = self._per_head(self.A)
        self.D_G1R1 = None if self.D is None else self._per_head(self.D).unsqueeze(1)
        self.raw_BGRT = self.dt.mT.unflatten(1, (self.groups, -1)).to(self.dtype)
        if self.dt_bias is not None:
            self.raw_BGRT = self.raw_BGRT + self._per_head(self.dt_bias)
        self.delta_BGRT = self.raw_BGRT
        if self.dt_softplus:
            self.delta_BGRT = torch.nn.functional.softplus(self.raw_BGRT, threshold=SOFTPLUS_THRESHOLD)
        # Bounded, because the difference of two infinite sums would be NaN.
        self.logs_BGRT = (self.delta_BGRT * self.A_GR1).clamp_(min=LOWEST[self.dtype])
        self.borders = [] if self.seq_idx is None else _borders(self.seq_idx)

    def split(self, x: Tensor) -> Tensor:
        """(B, T, H, P) as (B, G, T, R, P)."""
        return x.unflatten(2, (self.groups, -1)).transpose(1, 2)

    def _per_head(self, values_H: Tensor) -> Tensor:
        return values_H.to(self.dtype).view(self.groups, -1, 1)

    def new_state(self, state_BHPN: Tensor | None) -> Tensor:
        """A new (B, H, P, N) with the values of a state or of its gradient, zeros for None."""
        batch, _, heads, width = self.x.shape
        new_BHPN = self.x.new_zeros(batch, heads, width, self.B.shape[3], dtype=self.dtype)
        return new_BHPN if state_BHPN is None else new_BHPN.copy_(state_BHPN)

    def blocks(self) -> list[slice]:
        """The rows in blocks that run one after another: on a CPU as many at once as have their states in the cache."""
        batch, _, heads, width = self.x.shape
        row = heads * width * self.B.shape[3] * self.dtype.itemsize
        rows = max(1, CACHE // max(row, 1)) if self.x.device.type == "cpu" else max(batch, 1)
        return [slice(first, min(first + rows, batch)) for first in range(0, batch, rows)]

    def chunks(self, block: slice) -> list[list[Span]]:
        """The spans of each chunk of a block of rows, in order of time.

        A span ends where a document does: nothing of one document is multiplied by anything of another, not even by
        zero, which would hand NaN and infinity on.
        """
        starts, length = range(0, self.x.shape[1], self.chunk_size), self.x.shape[1]
        return [self._spans(block, t, min(t + self.chunk_size, length)) for t in starts]

    def _spans(self, block: slice, t0: int, t1: int) -> list[Span]:
        begins = [row[bisect_left(row, t0) : bisect_left(row, t1)] for row in self.borders[block]]
        if not any(begins):
            return [Span(block, slice(t0, t1), first_row=block.start)]
        spans = []
        for row, cuts in enumerate(begins, start=block.start):
            starts = sorted({t0, *cuts})
            for start, end in zip(starts, [*starts[1:], t1], strict=True):
                spans.append(Span(slice(row, row + 1), slice(start, end), start in cuts, block.start))
        return spans

    def load(self, span: Span) -> Chunk:
        """The inputs of a span."""
        rows, time = span.rows, span.time
        # Float64 on purpose: decays are differences of these sums, and of a sum of −100 float32 leaves five digits.
        logs_BGRC = self.logs_BGRT[rows, :, :, time].cumsum(dim=-1, dtype=torch.float64)
        return Chunk(
            self.work,
            self.x_BGTRP[rows, :, time].to(self.dtype),
            self.delta_BGRT[rows, :, :, time],
            logs_BGRC,
            self.B_BGTN[rows, :, time],
            self.C_BGTN[rows, :, time],
        )

    def ungated(self, chunk: Chunk, within_BGRCP: Tensor, read_BGCRP: Tensor) -> Tensor:
        """h_t C_t + D x_t, (B, G, C, R, P), given what the tokens say to one another and the state before times C."""
        out, factor_BGCR1 = self.work("y", *read_BGCRP.shape), by_token(chunk.from_start_BGRC)
        y_BGCRP = torch.addcmul(within_BGRCP.transpose(2, 3), read_BGCRP, factor_BGCR1, out=out)
        return y_BGCRP if self.D_G1R1 is None else y_BGCRP.addcmul_(chunk.x_BGCRP, self.D_G1R1)


def _borders(seq_idx_BT: Tensor) -> list[list[int]]:
    """For each row the tokens at which a document begins, without the first token."""
    borders: list[list[int]] = [[] for _ in range(seq_idx_BT.shape[0])]
    for row, before in (seq_idx_BT[:, 1:] != seq_idx_BT[:, :-1]).nonzero().tolist():
        borders[row].append(before + 1)
    return borders
