"""The SwiGLU gate."""

from torch import Tensor

from neural_layers.kernels import c_library, dispatch, triton_support
from neural_layers.kernels.dispatch import Backend, Op
from neural_layers.kernels.swiglu.fused import swiglu_native, swiglu_triton
from neural_layers.kernels.swiglu.native import quick
from neural_layers.kernels.swiglu.pytorch import swiglu_torch
from neural_layers.kernels.swiglu.reference import check_gate, swiglu_reference


def _native_obstacle(gate: Tensor, up: Tensor) -> str | None:
    return c_library.obstacle(gate, up)


_OP = Op(
    "swiglu",
    check=check_gate,
    backends=(
        Backend("native", swiglu_native, _native_obstacle, describe=c_library.describe, missing=c_library.MISSING),
        Backend("triton", swiglu_triton, triton_support.obstacle, triton_support.avoid),
        Backend("torch", swiglu_torch),
        Backend("reference", swiglu_reference),
    ),
)


def swiglu(gate: Tensor, up: Tensor, *, backend: str = "auto") -> Tensor:
    """silu(gate) · up, with silu(x) = x · sigmoid(x) (arXiv 2002.05202).

    gate, up: the same shape (..., F) and dtype, float64 to float16. Returns (..., F) in that dtype.
    Raises ValueError where the shapes differ, TypeError where the dtypes differ or are not floats, BackendError for a
    backend that cannot run.
    """
    if backend == "auto" and "swiglu" not in dispatch._forced:
        done = quick(gate, up, "silu")
        if done is not None:
            return done
    return _OP(backend, gate, up)
