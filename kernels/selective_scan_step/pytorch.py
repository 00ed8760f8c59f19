"""One step of the selective scan in traceable torch."""

import torch.nn.functional
from torch import Tensor

from neural_layers.kernels.arguments import accumulation_dtype
from neural_layers.kernels.selective_scan_step.reference import SOFTPLUS_THRESHOLD


def selective_scan_step_torch(
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
    """h = exp(Δ A) state + Δ B u;  y = (C·h + D u) · silu(z)."""
    wide_dtype = accumulation_dtype(state, u, delta, A, B, C, D, z, delta_bias)
    u_BE, delta_BE = u.to(wide_dtype), delta.to(wide_dtype)
    if delta_bias is not None:
        delta_BE = delta_BE + delta_bias.to(wide_dtype)
    if delta_softplus:
        delta_BE = torch.nn.functional.softplus(delta_BE, threshold=SOFTPLUS_THRESHOLD)
    decay_BEN = (delta_BE.unsqueeze(-1) * A.to(wide_dtype)).exp()
    drive_BEN = (delta_BE * u_BE).unsqueeze(-1) * B.to(wide_dtype).unsqueeze(1)
    state_BEN = torch.addcmul(drive_BEN, decay_BEN, state.to(wide_dtype))
    # Not a matrix product, which autocast would take in half precision.
    y_BE = (state_BEN * C.to(wide_dtype).unsqueeze(1)).sum(dim=-1)
    if D is not None:
        y_BE = torch.addcmul(y_BE, u_BE, D.to(wide_dtype))
    if z is not None:
        y_BE = y_BE * torch.nn.functional.silu(z.to(wide_dtype))
    return y_BE.to(u.dtype), state_BEN
