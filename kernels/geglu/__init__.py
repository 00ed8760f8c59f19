"""The GeGLU gate."""

from torch import Tensor

from neural_layers.kernels import c_library, dispatch, triton_support
from neural_layers.kernels.dispatch import Backend, Op
from neural_layers.kernels.geglu.fused import ACTIVATION, geglu_native, geglu_triton
from neural_layers.kernels.geglu.pytorch import geglu_torch
from neural_layers.kernels.geglu.reference import geglu_reference
from neural_layers.kernels.swiglu.native import quick
from neural_layers.kernels.swiglu.reference import check_gate


def _check(gate: Tensor, up: Tensor, approximate: str) -> None:
    check_gate(gate, up)
    if approximate not in ACTIVATION:
        raise ValueError(f"approximate={approximate!r} must be 'tanh' or 'none'")


def _native_obstacle(gate: Tensor, up: Tensor, approximate: str) -> str | None:
    return c_library.obstacle(gate, up)


_OP = Op(
    "geglu",
    check=_check,
    backends=(
        Backend("native", geglu_native, _native_obstacle, describe=c_library.describe, missing=c_library.MISSING),
        Backend("triton", geglu_triton, triton_support.obstacle, triton_support.avoid),
        Backend("torch", geglu_torch),
        Backend("reference", geglu_reference),
    ),
)


def geglu(gate: Tensor, up: Tensor, approximate: str = "tanh", *, backend: str = "auto") -> Tensor:
    """gelu(gate) · up (arXiv 2002.05202), gelu by the tanh formula or, with approximate="none", by the error function.

    gate, up: the same shape (..., F) and dtype, float64 to float16. Returns (..., F) in that dtype.
    Raises ValueError where the shapes differ or `approximate` is neither of the two, TypeError where the dtypes differ
    or are not floats, BackendError for a backend that cannot run.
    """
    if backend == "auto" and approximate in ACTIVATION and "geglu" not in dispatch._forced:
        done = quick(gate, up, ACTIVATION[approximate])
        if done is not None:
            return done
    return _OP(backend, gate, up, approximate)
