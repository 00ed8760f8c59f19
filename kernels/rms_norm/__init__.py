"""Root-mean-square normalisation."""

from torch import Tensor

from neural_layers.kernels import c_library, dispatch, triton_support
from neural_layers.kernels.arguments import FLOATS, check_devices, check_floats
from neural_layers.kernels.dispatch import Backend, Op
from neural_layers.kernels.rms_norm.fused import rms_norm_native, rms_norm_triton
from neural_layers.kernels.rms_norm.native import quick
from neural_layers.kernels.rms_norm.pytorch import rms_norm_torch
from neural_layers.kernels.rms_norm.reference import rms_norm_reference


def _check(x: Tensor, weight: Tensor, eps: float) -> None:
    # Asked in this way first, because it is quicker, and a decoding step has little else to do.
    if x.dtype not in FLOATS or weight.dtype not in FLOATS or x.device != weight.device:
        check_floats(x=x, weight=weight)
        check_devices(x=x, weight=weight)
    if x.ndim == 0 or weight.shape != x.shape[-1:]:
        raise ValueError(f"weight has shape {tuple(weight.shape)}; expected (D,) for x of shape {tuple(x.shape)}")
    if eps < 0:
        raise ValueError(f"eps={eps} must not be negative")


def _native_obstacle(x: Tensor, weight: Tensor, eps: float) -> str | None:
    return c_library.obstacle(x, weight)


_OP = Op(
    "rms_norm",
    check=_check,
    backends=(
        Backend("native", rms_norm_native, _native_obstacle, describe=c_library.describe, missing=c_library.MISSING),
        Backend("triton", rms_norm_triton, triton_support.obstacle, triton_support.avoid),
        Backend("torch", rms_norm_torch),
        Backend("reference", rms_norm_reference),
    ),
)


def rms_norm(x: Tensor, weight: Tensor, eps: float = 1e-6, *, backend: str = "auto") -> Tensor:
    """x / sqrt(mean(x², over the last dimension) + eps) · weight (arXiv 1910.07467).

    x: (..., D), weight: (D,), float64 to float16. The mean is taken in float32 for half inputs, in float64 for
    float64. Returns (..., D) in the dtype of x.
    Raises ValueError for shapes that do not fit or a negative eps, TypeError for tensors that are not floats,
    BackendError for a backend that cannot run.
    """
    if backend == "auto" and "rms_norm" not in dispatch._forced:
        done = quick(x, weight, eps)
        if done is not None:
            return done
    return _OP(backend, x, weight, eps)
