"""The scan of Mamba-2."""

from functools import partial
from typing import Any

from torch import Tensor

from neural_layers.kernels import triton_support
from neural_layers.kernels.arguments import check_devices, check_floats, check_seq_idx, match_shapes
from neural_layers.kernels.dispatch import Backend, Op
from neural_layers.kernels.ssd_scan.fused import ssd_scan_fused
from neural_layers.kernels.ssd_scan.reference import ssd_scan_reference


def _check(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    dt_softplus: bool,
    initial_state: Tensor | None,
    return_final_state: bool,
    seq_idx: Tensor | None,
    chunk_size: int,
) -> None:
    floats = {"x": x, "dt": dt, "A": A, "B": B, "C": C, "D": D, "z": z, "dt_bias": dt_bias}
    check_floats(**floats, initial_state=initial_state)
    check_devices(**floats, initial_state=initial_state, seq_idx=seq_idx)
    sizes: dict[str, int] = {}
    match_shapes(sizes, "BTHP", x=x, z=z)
    match_shapes(sizes, "BTH", dt=dt)
    match_shapes(sizes, "H", A=A, D=D, dt_bias=dt_bias)
    match_shapes(sizes, "BTGN", B=B, C=C)
    match_shapes(sizes, "BHPN", initial_state=initial_state)
    check_seq_idx(seq_idx, sizes["B"], sizes["T"])
    if sizes["G"] < 1 or sizes["H"] % sizes["G"]:
        raise ValueError(f"B and C have G={sizes['G']} groups, which must divide the H={sizes['H']} heads of x")
    if chunk_size < 1:
        raise ValueError(f"chunk_size={chunk_size} must be at least 1")


def _triton_obstacle(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, *args: Any, chunk_size: int, **kwargs: Any
) -> str | None:
    reason = triton_support.obstacle(x, dt, A, B, *args, **kwargs)
    if reason is None and (chunk_size > 64 or x.shape[3] > 128):
        return "chunk_size is above 64 or a head wider than 128, and the kernels keep a chunk of a head in registers"
    if reason is None and B.shape[3] == 0:
        return "the state has no entries"
    return reason


_OP = Op(
    "ssd_scan",
    check=_check,
    backends=(
        Backend("triton", partial(ssd_scan_fused, "triton"), _triton_obstacle, triton_support.avoid),
        Backend("torch", partial(ssd_scan_fused, "torch")),
        Backend("reference", ssd_scan_reference),
    ),
)


def ssd_scan(
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
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """The state space duality of Mamba-2 (arXiv 2405.21060): a state of P × N numbers for each head, one decay for all.

    h_t = exp(Δ_t A) h_{t−1} + Δ_t x_t B_tᵀ;  y_t = (h_t C_t + D x_t) · silu(z_t)
    with Δ = dt + dt_bias, through softplus where `dt_softplus`.

    x, z:          (B, T, H, P)
    dt:            (B, T, H)
    A:             (H), negative where the state is to decay
    B, C:          (B, T, G, N); each of G groups serves H / G neighbouring heads
    D, dt_bias:    (H); a D of (H, P) is not taken
    initial_state: (B, H, P, N), h before the first token, whose document it belongs to; zeros where left out
    seq_idx:       (B, T) of int32 or int64; where it changes from one token to the next, another document begins
                   and h is set to zero. A number that comes back later is a new document.
    chunk_size:    the number of tokens that are multiplied with one another at a time. It changes speed and memory,
                   and the result by rounding alone; `reference` goes token by token, whatever it is.
    All floats may be float64 to float16, in any mixture. Arguments left out drop out of the formula. The backend
    `triton` takes a chunk_size of at most 64, heads of a width P of at most 128, and a state of N ≥ 1.

    Returns y (B, T, H, P) in the dtype of x; with `return_final_state` the pair of y and the last h (B, H, P, N), which
    is float64 where an argument is float64 and float32 otherwise, as are all sums. Both are differentiable, and the
    final state given as the next chunk's `initial_state` continues the scan exactly. For the backward pass a state is
    kept for every `chunk_size` tokens. Gradients of gradients need `backend="reference"`; the others raise
    NotImplementedError.
    Raises ValueError for shapes, devices or a chunk size that do not fit, TypeError for wrong dtypes, BackendError for
    a backend that cannot run.
    """
    return _OP(
        backend,
        x,
        dt,
        A,
        B,
        C,
        D=D,
        z=z,
        dt_bias=dt_bias,
        dt_softplus=dt_softplus,
        initial_state=initial_state,
        return_final_state=return_final_state,
        seq_idx=seq_idx,
        chunk_size=chunk_size,
    )
