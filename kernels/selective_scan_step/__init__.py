"""One token of the selective scan of Mamba, for decoding."""

import torch
from torch import Tensor

from neural_layers.kernels import c_library, triton_support
from neural_layers.kernels.arguments import check_devices, check_floats, match_shapes
from neural_layers.kernels.dispatch import Backend, Op
from neural_layers.kernels.selective_scan_step.fused import selective_scan_step_triton, triton_obstacle
from neural_layers.kernels.selective_scan_step.native import obstacle, selective_scan_step_native
from neural_layers.kernels.selective_scan_step.pytorch import selective_scan_step_torch
from neural_layers.kernels.selective_scan_step.reference import selective_scan_step_reference


def _check(
    state: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    delta_softplus: bool,
) -> None:
    if _plainly_right(state, u, delta, A, B, C, D, z, delta_bias):
        return
    tensors = {"state": state, "u": u, "delta": delta, "A": A, "B": B, "C": C}
    tensors |= {name: given for name, given in (("D", D), ("z", z), ("delta_bias", delta_bias)) if given is not None}
    check_floats(**tensors)
    check_devices(**tensors)
    sizes: dict[str, int] = {}
    match_shapes(sizes, "BE", u=u, delta=delta, z=z)
    match_shapes(sizes, "EN", A=A)
    match_shapes(sizes, "BN", B=B, C=C)
    match_shapes(sizes, "E", D=D, delta_bias=delta_bias)
    match_shapes(sizes, "BEN", state=state)


def _plainly_right(
    state: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
) -> bool:
    """Whether all arguments are float32 on the CPU and fit, seen in a sixth of the time that `_check` takes."""
    if state.ndim != 3:
        return False
    rows, width, states = state.shape
    by_row, by_state, by_channel = (rows, width), (rows, states), (width,)
    for tensor, shape in (
        (state, state.shape), (u, by_row), (delta, by_row), (z, by_row), (A, (width, states)), (B, by_state),
        (C, by_state), (D, by_channel), (delta_bias, by_channel),
    ):  # fmt: skip
        if tensor is not None and not (tensor.shape == shape and tensor.dtype is torch.float32 and tensor.is_cpu):
            return False
    return True


_OP = Op(
    "selective_scan_step",
    check=_check,
    backends=(
        Backend("native", selective_scan_step_native, obstacle, missing=c_library.MISSING, describe=c_library.describe),
        Backend("triton", selective_scan_step_triton, triton_obstacle, triton_support.avoid),
        Backend("torch", selective_scan_step_torch),
        Backend("reference", selective_scan_step_reference),
    ),
)


def selective_scan_step(
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
    backend: str = "auto",
) -> tuple[Tensor, Tensor]:
    """One token of `selective_scan` (Mamba, arXiv 2312.00752).

    h = exp(Δ A) state + Δ B u;  y = (C·h + D u) · silu(z), with Δ = delta + delta_bias, through softplus where asked.

    state: (B, E, N), not modified; u, delta, z: (B, E); A: (E, N); B, C: (B, N); D, delta_bias: (E); float64 to
    float16 in any mixture. Arguments left out drop out of the formula.
    Returns y (B, E) in the dtype of u, and the new state (B, E, N) in float64 where an argument is float64 and in
    float32 otherwise.
    Raises ValueError for shapes or devices that do not fit, TypeError for tensors that are not floats, BackendError
    for a backend that cannot run.
    """
    return _OP(backend, state, u, delta, A, B, C, D=D, z=z, delta_bias=delta_bias, delta_softplus=delta_softplus)
