"""The selective scan of Mamba."""

from functools import partial
from typing import Any

from torch import Tensor

from neural_layers.kernels import c_library, triton_support
from neural_layers.kernels.arguments import check_devices, check_floats, check_seq_idx, match_shapes
from neural_layers.kernels.dispatch import Backend, Op
from neural_layers.kernels.selective_scan.fused import selective_scan_fused
from neural_layers.kernels.selective_scan.reference import selective_scan_reference


def _check(
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
    initial_state: Tensor | None,
    return_final_state: bool,
    seq_idx: Tensor | None,
) -> None:
    floats = {"u": u, "delta": delta, "A": A, "B": B, "C": C, "D": D, "z": z, "delta_bias": delta_bias}
    check_floats(**floats, initial_state=initial_state)
    check_devices(**floats, initial_state=initial_state, seq_idx=seq_idx)
    sizes: dict[str, int] = {}
    match_shapes(sizes, "BTE", u=u, delta=delta, z=z)
    match_shapes(sizes, "EN", A=A)
    match_shapes(sizes, "BTN", B=B, C=C)
    match_shapes(sizes, "E", D=D, delta_bias=delta_bias)
    match_shapes(sizes, "BEN", initial_state=initial_state)
    check_seq_idx(seq_idx, sizes["B"], sizes["T"])


def _native_obstacle(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, **optional: Any) -> str | None:
    # All tensors lie on one device, and the kernel takes every argument in every dtype.
    return c_library.obstacle(u)


_OP = Op(
    "selective_scan",
    check=_check,
    backends=(
        Backend(
            "native",
            partial(selective_scan_fused, backend="native"),
            _native_obstacle,
            missing=c_library.MISSING,
            describe=c_library.describe,
        ),
        Backend(
            "triton",
            partial(selective_scan_fused, backend="triton"),
            triton_support.obstacle,
            triton_support.avoid,
        ),
        Backend("torch", partial(selective_scan_fused, backend="torch")),
        Backend("reference", selective_scan_reference),
    ),
)


def selective_scan(
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
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """The selective state space recurrence of Mamba (arXiv 2312.00752).

    h_t = exp(Δ_t A) h_{t−1} + Δ_t B_t u_t;  y_t = (C_t·h_t + D u_t) · silu(z_t)
    with Δ = delta + delta_bias, through softplus where `delta_softplus`.

    u, delta, z:   (B, T, E)
    A:             (E, N), negative where the state is to decay
    B, C:          (B, T, N)
    D, delta_bias: (E)
    initial_state: (B, E, N), h before the first token, whose document it belongs to; zeros where left out
    seq_idx:       (B, T) of int32 or int64; where it changes from one token to the next, another document begins
                   and h is set to zero. A number that comes back later is a new document.
    All floats may be float64 to float16, in any mixture. Arguments left out drop out of the formula.

    Returns y (B, T, E) in the dtype of u; with `return_final_state` the pair of y and the last h (B, E, N), which is
    float64 where an argument is float64 and float32 otherwise, as are all sums. Both are differentiable, and the
    final state given as the next chunk's `initial_state` continues the scan exactly. Gradients of gradients need
    `backend="reference"`; the others raise NotImplementedError.
    Raises ValueError for shapes or devices that do not fit, TypeError for wrong dtypes, BackendError for a backend
    that cannot run.
    """
    return _OP(
        backend,
        u,
        delta,
        A,
        B,
        C,
        D=D,
        z=z,
        delta_bias=delta_bias,
        delta_softplus=delta_softplus,
        initial_state=initial_state,
        return_final_state=return_final_state,
        seq_idx=seq_idx,
    )
