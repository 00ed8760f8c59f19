"""Causal depthwise convolution over time."""

from typing import Any

from torch import Tensor

from neural_layers.kernels import c_library, dispatch, triton_support
from neural_layers.kernels.arguments import check_devices, check_floats, check_seq_idx, match_shapes
from neural_layers.kernels.causal_conv1d.fused import causal_conv1d_native, causal_conv1d_triton
from neural_layers.kernels.causal_conv1d.native import step
from neural_layers.kernels.causal_conv1d.pytorch import causal_conv1d_torch
from neural_layers.kernels.causal_conv1d.reference import causal_conv1d_reference
from neural_layers.kernels.dispatch import Backend, Op


def _check(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    activation: str | None,
    initial_state: Tensor | None,
    return_final_state: bool,
    seq_idx: Tensor | None,
) -> None:
    check_floats(x=x, weight=weight, bias=bias, initial_state=initial_state)
    check_devices(x=x, weight=weight, bias=bias, initial_state=initial_state, seq_idx=seq_idx)
    sizes: dict[str, int] = {}
    match_shapes(sizes, "BTE", x=x)
    match_shapes(sizes, "EW", weight=weight)
    match_shapes(sizes, "E", bias=bias)
    if sizes["W"] < 1:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; the convolution width W=0 must be at least 1")
    if initial_state is not None:
        expected = (sizes["B"], sizes["W"] - 1, sizes["E"])
        if initial_state.shape != expected:
            raise ValueError(
                f"initial_state has shape {tuple(initial_state.shape)}; expected (B, W − 1, E) = {expected}"
            )
    check_seq_idx(seq_idx, sizes["B"], sizes["T"])
    if activation not in (None, "silu"):
        raise ValueError(f"activation={activation!r} must be None or 'silu'")


def _native_obstacle(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *,
    activation: str | None,
    initial_state: Tensor | None,
    return_final_state: bool,
    seq_idx: Tensor | None,
) -> str | None:
    return c_library.obstacle(x, weight, bias, initial_state, seq_idx)


def _triton_obstacle(x: Tensor, weight: Tensor, *args: Any, **kwargs: Any) -> str | None:
    reason = "the convolution has more than 8 taps, and the kernels keep each in registers"
    return triton_support.obstacle(x, weight, *args, **kwargs) or (reason if weight.shape[1] > 8 else None)


_OP = Op(
    "causal_conv1d",
    check=_check,
    backends=(
        Backend(
            "native",
            causal_conv1d_native,
            _native_obstacle,
            describe=c_library.describe,
            missing=c_library.MISSING,
        ),
        Backend("triton", causal_conv1d_triton, _triton_obstacle, triton_support.avoid),
        Backend("torch", causal_conv1d_torch),
        Backend("reference", causal_conv1d_reference),
    ),
)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    seq_idx: Tensor | None = None,
    backend: str = "auto",
) -> Tensor | tuple[Tensor, Tensor]:
    """The causal depthwise convolution of Mamba (arXiv 2312.00752); y[t] sees inputs t − (W−1) … t.

    y[t, e] = Σ_w weight[e, w]·x[t − (W−1) + w, e] + bias[e], then silu where `activation="silu"`.

    x:             (B, T, E)
    weight, bias:  (E, W), (E)
    initial_state: (B, W−1, E), the inputs before x, the latest last; they belong to the document of the first token.
                   Zeros where left out.
    seq_idx:       (B, T) of int32 or int64; where it changes from one token to the next, another document begins,
                   and inputs of other documents contribute nothing. A number that comes back later is a new document.
    All floats may be float64 to float16, in any mixture; sums are taken in float64 where an argument is float64 and
    in float32 otherwise.

    Returns y (B, T, E) in the dtype of x; with `return_final_state` the pair of y and the last W−1 inputs
    (B, W−1, E), zero where they are not of the last token's document, in the dtype of x, or the wider one of it and
    the initial state's. Both are differentiable, and the final state given as the next chunk's `initial_state`
    continues the convolution exactly, as long as that chunk's first token is of the same document.
    Raises ValueError for shapes, devices or an activation that do not fit, TypeError for wrong dtypes, BackendError
    for a backend that cannot run.
    """
    free = backend == "auto" and "causal_conv1d" not in dispatch._forced
    if free and initial_state is not None and return_final_state and seq_idx is None:
        # A decoding step takes less than the checks and the choice that every call goes through.
        done = step(x, weight, bias, activation, initial_state)
        if done is not None:
            return done
    return _OP(
        backend,
        x,
        weight,
        bias,
        activation=activation,
        initial_state=initial_state,
        return_final_state=return_final_state,
        seq_idx=seq_idx,
    )
