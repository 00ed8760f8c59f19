"""The Mamba-2 scan in its matrix form (arXiv 2405.21060, section 6), chunk by chunk (implementation `torch`).

With s_t the sum of Δ A from the start of a chunk to its token t, and h the state before the chunk:

    y_t = Σ_{s ≤ t} e^{s_t − s_s} (C_t·B_s) Δ_s x_s  +  e^{s_t} h C_t  +  D x_t
    h'  = e^{s_end} h  +  Σ_s e^{s_end − s_s} Δ_s x_s B_sᵀ

C·Bᵀ, h C and the sum in h' are one matrix product for all heads of a group; the sum in y needs one for each head.
The chunks follow one another, so that the work of each stays in the cache.

Dimension letters: B batch, H heads, P head width, N state size.
"""

import torch
import torch.nn.functional
from torch import Tensor

from neural_layers.kernels.ssd_scan.backward import Backward
from neural_layers.kernels.ssd_scan.chunks import Scan, Span
from neural_layers.kernels.ssd_scan.token import one_token

# A state is kept for every fourth chunk: to compute the others again takes no longer than to write and read them, and
# at P = 64, N = 128 all of them, one for 64 tokens, would be twice as large as x.
STRIDE = 4


def forward(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    dt_softplus: bool,
    chunk_size: int,
    keep_states: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y, the final state, and the kept states, of which the last one is not needed."""
    if x.shape[1] == 1 and not keep_states:
        return one_token(x, dt, A, B, C, D, z, dt_bias, initial_state, dt_softplus)
    scan = Scan(x, dt, A, B, C, D, z, dt_bias, initial_state, seq_idx, dt_softplus, chunk_size)
    state_BHPN, y = scan.new_state(initial_state), x.new_empty(x.shape)
    tokens = chunk_size * STRIDE
    kept = state_BHPN.new_empty((x.shape[1] + tokens - 1) // tokens + 1 if keep_states else 0, *state_BHPN.shape)
    y_BGTRP = scan.split(y)
    for block in scan.blocks():
        for j, spans in enumerate(scan.chunks(block)):
            if keep_states and j % STRIDE == 0:
                kept[j // STRIDE, block] = state_BHPN[block]
            for span in spans:
                _run(scan, span, state_BHPN[span.rows], y_BGTRP)
    if keep_states:
        kept[-1] = state_BHPN
    return y, state_BHPN, kept


def _run(scan: Scan, span: Span, state_BHPN: Tensor, y_BGTRP: Tensor) -> None:
    """Write a span of y, and the state after it in place of the one before."""
    if span.begins:
        # A fill, not a product with 0: the document before may have left NaN or inf.
        state_BHPN.zero_()
    chunk = scan.load(span)
    within_BGRCP = chunk.within()
    if span.length > 1 and not within_BGRCP.sum().isfinite():
        # Within a span each token is multiplied, if by zero, by those after it: NaN would flow back in time.
        for token in span.tokens():
            _run(scan, token, state_BHPN, y_BGTRP)
        return
    y_BGCRP = scan.ungated(chunk, within_BGRCP, chunk.through_state("read", chunk.C_BGCN, state_BHPN))
    if scan.z_BGTRP is not None:
        y_BGCRP *= torch.nn.functional.silu(scan.z_BGTRP[span.rows, :, span.time].to(scan.dtype))
    y_BGTRP[span.rows, :, span.time] = y_BGCRP
    chunk.advance(state_BHPN, state_BHPN)


def backward(
    grad_y: Tensor,
    grad_final_state: Tensor | None,
    kept: Tensor,
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    dt_softplus: bool,
    chunk_size: int,
) -> list[Tensor]:
    """The gradients of x, dt, A, B, C, and of D, z, dt_bias, initial_state where given."""
    scan = Scan(x, dt, A, B, C, D, z, dt_bias, initial_state, seq_idx, dt_softplus, chunk_size)
    gradients = Backward(scan, grad_y, grad_final_state)
    for block in scan.blocks():
        chunks = scan.chunks(block)
        again = kept.new_empty(STRIDE, block.stop - block.start, *kept.shape[2:])
        for j in reversed(range(0, len(chunks), STRIDE)):
            some = chunks[j : j + STRIDE]
            states = [kept[j // STRIDE, block], *again[1 : len(some)].unbind(0)]
            for spans, before_BHPN, after_BHPN in zip(some[:-1], states[:-1], states[1:], strict=True):
                _advance(scan, spans, before_BHPN, after_BHPN)
            for spans, before_BHPN in reversed(list(zip(some, states, strict=True))):
                for span in reversed(spans):
                    state_BHPN = before_BHPN[span.in_block]
                    gradients.run(span, torch.zeros_like(state_BHPN) if span.begins else state_BHPN)
    return gradients.results()


def _advance(scan: Scan, spans: list[Span], before_BHPN: Tensor, after_BHPN: Tensor) -> None:
    """Write the state after a chunk, given the one before."""
    for span in spans:
        state_BHPN = after_BHPN[span.in_block]
        if span.begins:
            scan.load(span).advance(state_BHPN.zero_(), state_BHPN)
        else:  # the first span of its rows
            scan.load(span).advance(before_BHPN[span.in_block], state_BHPN)
