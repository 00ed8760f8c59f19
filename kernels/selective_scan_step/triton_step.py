"""One step of the selective scan on the GPU (backend `triton`), for decoding.

Letters: B batch, E channels, N states.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl
from torch import Tensor

from neural_layers.kernels.arguments import accumulation_dtype
from neural_layers.kernels.selective_scan.triton_forward import channel_block, over_states, softplus
from neural_layers.kernels.triton_support import LAUNCH, accumulator, contiguous, on_device, rows


@triton.jit
def _step(
    state, u, delta, A, B, C, D, z, bias, y, new_state, width, state_B, u_B, delta_B, B_B, C_B, z_B,
    N: tl.constexpr, PAD: tl.constexpr, SOFTPLUS: tl.constexpr, HAS_D: tl.constexpr, HAS_Z: tl.constexpr,
    HAS_BIAS: tl.constexpr, ACC: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """h = exp(Δ A) state + Δ B u;  y = (C·h + D u) · silu(z), for one row and a block of channels.

    Reads state and A and writes the new state, 12·N bytes for each row and channel in float32, and 8 bytes of u, delta,
    z and y in bfloat16, for N exponentials and 5·N other operations; A comes from the L2 cache for all rows but one.
    """
    b = tl.program_id(0).to(tl.int64)
    e = tl.program_id(1) * CHANNELS + tl.arange(0, CHANNELS)
    n = tl.arange(0, PAD)
    e_mask = e < width
    n_mask = n < N
    mask = e_mask[:, None] & n_mask[None, :]
    tile = e[:, None] * N + n[None, :]
    h = tl.load(state + b * state_B + tile, mask, other=0.0).to(ACC)
    A_EN = tl.load(A + tile, mask, other=0.0).to(ACC)
    u_E = tl.load(u + b * u_B + e, e_mask, other=0.0).to(ACC)
    d = tl.load(delta + b * delta_B + e, e_mask, other=0.0).to(ACC)
    B_N = tl.load(B + b * B_B + n, n_mask, other=0.0).to(ACC)
    C_N = tl.load(C + b * C_B + n, n_mask, other=0.0).to(ACC)
    if HAS_BIAS:
        d += tl.load(bias + e, e_mask, other=0.0).to(ACC)
    if SOFTPLUS:
        d = softplus(d, ACC)
    h = tl.exp(d[:, None] * A_EN) * h + (d * u_E)[:, None] * B_N[None, :]
    out = over_states(h * C_N[None, :], N, PAD)
    if HAS_D:
        out += tl.load(D + e, e_mask, other=0.0).to(ACC) * u_E
    if HAS_Z:
        z_E = tl.load(z + b * z_B + e, e_mask, other=0.0).to(ACC)
        out = out * (z_E * tl.sigmoid(z_E))
    tl.store(y + b * width + e, out, e_mask)
    tl.store(new_state + b * width * N + tile, h, mask)


def step(
    state: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> tuple[Tensor, Tensor]:
    """y (B, E) in the dtype of u, and the new state (B, E, N) in the accumulation dtype."""
    given = (state, u, delta, A, B, C, D, z, delta_bias)
    dtype = accumulation_dtype(*given)
    batch, width, states = state.shape
    y, new_state = u.new_empty(u.shape), state.new_empty(state.shape, dtype=dtype)
    if y.numel() == 0:
        return y, new_state
    if state.stride(2) != 1 or state.stride(1) != states:
        state = state.contiguous()
    A, (D, delta_bias) = A.contiguous(), contiguous(D, delta_bias)
    u, delta, B, C, z = rows(u), rows(delta), rows(B), rows(C), rows(z)
    block, pad, warps = channel_block(width, states, dtype)
    with on_device(u):
        _step[(batch, triton.cdiv(width, block))](
            state, u, delta, A, B, C, D, z, delta_bias, y, new_state, width,
            state.stride(0), u.stride(0), delta.stride(0), B.stride(0), C.stride(0), 0 if z is None else z.stride(0),
            states, pad, delta_softplus, D is not None, z is not None, delta_bias is not None, accumulator(*given),
            block,
            num_warps=warps, **LAUNCH,
        )  # fmt: skip
    return y, new_state
