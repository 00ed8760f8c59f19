"""The SwiGLU gate."""

from torch import Tensor

from neural_layers.kernels.dispatch import Backend, Op
from neural_layers.kernels.swiglu.pytorch import swiglu_torch
from neural_layers.kernels.swiglu.reference import check_gate, swiglu_reference

_OP = Op(
    "swiglu",
    check=check_gate,
    backends=(Backend("torch", swiglu_torch), Backend("reference", swiglu_reference)),
)


def swiglu(gate: Tensor, up: Tensor, *, backend: str = "auto") -> Tensor:
    """silu(gate) · up, with silu(x) = x · sigmoid(x) (arXiv 2002.05202).

    gate, up: the same shape (..., F) and dtype, float64 to float16. Returns (..., F) in that dtype.
    Raises ValueError where the shapes differ, TypeError where the dtypes differ or are not floats, BackendError for a
    backend that cannot run.
    """
    return _OP(backend, gate, up)
