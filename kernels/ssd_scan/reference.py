"""The definition of the Mamba-2 scan: one token at a time."""

import torch
import torch.nn.functional
from torch import Tensor

from neural_layers.kernels.arguments import accumulation_dtype
from neural_layers.kernels.selective_scan_step.reference import SOFTPLUS_THRESHOLD


def ssd_scan_reference(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    seq_idx: Tensor | None = None,
    chunk_size: int = 64,
) -> Tensor | tuple[Tensor, Tensor]:
    """h_t = exp(Δ_t A) h_{t−1} + Δ_t x_t B_tᵀ, where h_{t−1} is 0 at a border of documents; a chunk is one token."""
    wide_dtype = accumulation_dtype(x, dt, A, B, C, D, z, dt_bias, initial_state)
    (batch, _, heads, width), states = x.shape, B.shape[3]
    delta_BTH = dt.to(wide_dtype)
    if dt_bias is not None:
        delta_BTH = delta_BTH + dt_bias.to(wide_dtype)
    if dt_softplus:
        delta_BTH = torch.nn.functional.softplus(delta_BTH, threshold=SOFTPLUS_THRESHOLD)
    x_BTHP, decay_BTH = x.to(wide_dtype), torch.exp(delta_BTH * A.to(wide_dtype))
    B_BTHN, C_BTHN = (v.to(wide_dtype).repeat_interleave(heads // B.shape[2], dim=2) for v in (B, C))
    if initial_state is None:
        state_BHPN = x.new_zeros(batch, heads, width, states, dtype=wide_dtype)
    else:
        state_BHPN = initial_state.to(wide_dtype)

    outputs = []
    # unbind, because the backward of `x[:, t]` would write a whole zero tensor at every step.
    steps = zip(*(v.unbind(1) for v in (x_BTHP, delta_BTH, decay_BTH, B_BTHN, C_BTHN)), strict=True)
    for t, (x_BHP, delta_BH, decay_BH, B_BHN, C_BHN) in enumerate(steps):
        if seq_idx is not None and t > 0:
            border_B111 = (seq_idx[:, t] != seq_idx[:, t - 1]).view(-1, 1, 1, 1)
            state_BHPN = state_BHPN.masked_fill(border_B111, 0)
        drive_BHP = delta_BH.unsqueeze(-1) * x_BHP
        state_BHPN = decay_BH[:, :, None, None] * state_BHPN + drive_BHP.unsqueeze(-1) * B_BHN.unsqueeze(2)
        outputs.append((state_BHPN * C_BHN.unsqueeze(2)).sum(dim=-1))
    y_BTHP = torch.stack(outputs, dim=1) if outputs else torch.zeros_like(x_BTHP)
    if D is not None:
        y_BTHP = y_BTHP + D.to(wide_dtype).unsqueeze(-1) * x_BTHP
    if z is not None:
        z_BTHP = z.to(wide_dtype)
        y_BTHP = y_BTHP * (z_BTHP * torch.sigmoid(z_BTHP))
    y_BTHP = y_BTHP.to(x.dtype)
    return (y_BTHP, state_BHPN) if return_final_state else y_BTHP
