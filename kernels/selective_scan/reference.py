"""The definition of the selective scan: the step of one token, in a loop."""

import torch
from torch import Tensor

from neural_layers.kernels.arguments import accumulation_dtype
from neural_layers.kernels.selective_scan_step.reference import selective_scan_step_reference


def selective_scan_reference(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    seq_idx: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """h_t = exp(Δ_t A) h_{t−1} + Δ_t B_t u_t, where h_{t−1} is 0 at a border of documents."""
    wide_dtype = accumulation_dtype(u, delta, A, B, C, D, z, delta_bias, initial_state)
    if initial_state is None:
        state_BEN = u.new_zeros(u.shape[0], *A.shape, dtype=wide_dtype)
    else:
        state_BEN = initial_state.to(wide_dtype)
    # unbind, because the backward of `x[:, t]` would write a whole zero tensor at every step.
    gates = [None] * u.shape[1] if z is None else z.unbind(1)
    outputs = []
    for t, (u_BE, delta_BE, B_BN, C_BN, z_BE) in enumerate(
        zip(u.unbind(1), delta.unbind(1), B.unbind(1), C.unbind(1), gates, strict=True)
    ):
        if seq_idx is not None and t > 0:
            border_B11 = (seq_idx[:, t] != seq_idx[:, t - 1]).view(-1, 1, 1)
            state_BEN = state_BEN.masked_fill(border_B11, 0)
        y_BE, state_BEN = selective_scan_step_reference(
            state_BEN, u_BE, delta_BE, A, B_BN, C_BN, D=D, z=z_BE, delta_bias=delta_bias, delta_softplus=delta_softplus
        )
        outputs.append(y_BE)
    y_BTE = torch.stack(outputs, dim=1) if outputs else torch.zeros_like(u)
    return (y_BTE, state_BEN) if return_final_state else y_BTE
