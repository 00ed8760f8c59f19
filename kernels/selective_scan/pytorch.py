"""The selective scan in chunks, with its backward by recomputation (backend `torch`).

No (B, T, E, N) tensor is built or saved: the forward pass keeps the state before each chunk, and the backward pass runs
each chunk again. Within a chunk a step is one multiply-add; the closed form with cumulative products is not used,
because it divides by products of decays that vanish.

Dimension letters: B batch, T length, E inner width, N state size, J chunks.
"""

import torch
from torch import Tensor

from neural_layers.kernels.selective_scan.backward import Backward
from neural_layers.kernels.selective_scan.chunks import Scan


def forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    delta_softplus: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, T, E), the final state (B, E, N) and the states at the borders of the chunks (J + 1, B, N, E)."""
    scan = Scan(u, delta, A, B, C, D, z, delta_bias, initial_state, seq_idx, delta_softplus)
    spans, state_BNE = list(scan.spans()), scan.new_state(initial_state)
    # The state before each chunk and, last, the final one: with J + 1 there are two or more however short the sequence,
    # and torch.export does not take the one chunk of its example for a constant.
    y, borders = u.new_empty(u.shape), scan.work(len(spans) + 1)
    # Inside autocast the op would otherwise multiply matrices in half precision, here and in the backward pass.
    with torch.autocast(u.device.type, enabled=False):
        for start_BNE, (t0, t1) in zip(borders[:-1].unbind(0), spans, strict=True):
            start_BNE.copy_(state_BNE)
            chunk = scan.run(t0, t1, start_BNE)
            y_CBE = scan.ungated(chunk)
            if chunk.z_CBE is not None:
                y_CBE *= torch.nn.functional.silu(chunk.z_CBE)
            y[:, t0:t1] = y_CBE.transpose(0, 1)
            state_BNE = chunk.states_CBNE[-1]
    borders[-1] = state_BNE
    return y, state_BNE.mT.contiguous(), borders


def backward(
    grad_y: Tensor,
    grad_final_state: Tensor | None,
    borders: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    delta_softplus: bool,
) -> list[Tensor]:
    """The gradients of u, delta, A, B, C, and of D, z, delta_bias, initial_state where given."""
    scan = Scan(u, delta, A, B, C, D, z, delta_bias, initial_state, seq_idx, delta_softplus)
    backward = Backward(scan, grad_y, grad_final_state)
    with torch.autocast(u.device.type, enabled=False):
        for start_BNE, (t0, t1) in reversed(list(zip(borders[:-1].unbind(0), scan.spans(), strict=True))):
            backward.run(t0, t1, start_BNE)
    return backward.results()
