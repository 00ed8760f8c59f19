"""One token of the Mamba-2 scan without a gradient, for decoding: there the overhead of chunks would count."""

import torch
import torch.nn.functional
from torch import Tensor

from neural_layers.kernels.arguments import accumulation_dtype
from neural_layers.kernels.selective_scan_step.reference import SOFTPLUS_THRESHOLD


def one_token(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    initial_state: Tensor | None,
    dt_softplus: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, 1, H, P), the state (B, H, P, N), and no kept states; the arguments are those of the scan, with T = 1."""
    dtype = accumulation_dtype(x, dt, A, B, C, D, z, dt_bias, initial_state)
    (batch, _, heads, width), (groups, states) = x.shape, B.shape[2:]
    x_BHP, delta_BH1 = x[:, 0].to(dtype), dt[:, 0].to(dtype)
    if dt_bias is not None:
        delta_BH1 = delta_BH1 + dt_bias.to(dtype)
    if dt_softplus:
        delta_BH1 = torch.nn.functional.softplus(delta_BH1, threshold=SOFTPLUS_THRESHOLD)
    delta_BH1 = delta_BH1.unsqueeze(-1)
    by_group = (batch, groups, heads // groups * width)
    drive_BGU1 = (x_BHP * delta_BH1).reshape(*by_group, 1)
    B_BG1N, C_BGN1 = B.to(dtype).transpose(1, 2), C.to(dtype).permute(0, 2, 3, 1)
    if initial_state is None:
        state_BGUN = drive_BGU1 * B_BG1N
    else:
        decay_BH11 = (delta_BH1 * A.to(dtype).unsqueeze(-1)).exp().unsqueeze(-1)
        state_BGUN = (initial_state.to(dtype) * decay_BH11).reshape(*by_group, states).addcmul_(drive_BGU1, B_BG1N)
    y_BHP = (state_BGUN @ C_BGN1).view(x_BHP.shape)
    if D is not None:
        y_BHP = torch.addcmul(y_BHP, x_BHP, D.to(dtype).unsqueeze(-1))
    if z is not None:
        y_BHP = y_BHP * torch.nn.functional.silu(z[:, 0].to(dtype))
    state_BHPN = state_BGUN.view(batch, heads, width, states)
    return y_BHP.to(x.dtype).unsqueeze(1), state_BHPN, state_BHPN.new_empty(0, *state_BHPN.shape)
