"""The definition of one step of the selective scan."""

import torch.nn.functional
from torch import Tensor

from neural_layers.kernels.arguments import accumulation_dtype

# softplus(x) = x above it: exact in float64, which torch's own 20 is not (e⁻²⁰ = 2e-9), and e⁴⁰ fits float32.
SOFTPLUS_THRESHOLD = 40.0


def selective_scan_step_reference(
    state: Tensor,
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
) -> tuple[Tensor, Tensor]:
    """h = exp(Δ A) state + Δ B u;  y = (C·h + D u) · silu(z), with the sums written out."""
    wide_dtype = accumulation_dtype(state, u, delta, A, B, C, D, z, delta_bias)
    u_BE, delta_BE = u.to(wide_dtype), delta.to(wide_dtype)
    if delta_bias is not None:
        delta_BE = delta_BE + delta_bias.to(wide_dtype)
    if delta_softplus:
        delta_BE = torch.nn.functional.softplus(delta_BE, threshold=SOFTPLUS_THRESHOLD)
    delta_BE1, B_B1N, C_B1N = delta_BE.unsqueeze(-1), B.to(wide_dtype).unsqueeze(1), C.to(wide_dtype).unsqueeze(1)
    decay_BEN = torch.exp(delta_BE1 * A.to(wide_dtype))
    state_BEN = decay_BEN * state.to(wide_dtype) + delta_BE1 * B_B1N * u_BE.unsqueeze(-1)
    y_BE = (C_B1N * state_BEN).sum(dim=-1)
    if D is not None:
        y_BE = y_BE + D.to(wide_dtype) * u_BE
    if z is not None:
        z_BE = z.to(wide_dtype)
        y_BE = y_BE * (z_BE * torch.sigmoid(z_BE))
    return y_BE.to(u.dtype), state_BEN
