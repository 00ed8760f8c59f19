"""The linear layer, fast also for the few rows of a decoding step."""

import torch
from torch import Tensor

from neural_layers.kernels import c_library, dispatch
from neural_layers.kernels.arguments import FLOATS, check_devices, check_floats
from neural_layers.kernels.dispatch import Backend, Op
from neural_layers.kernels.linear.native import MOST_ROWS, linear_native, quick
from neural_layers.kernels.linear.pytorch import linear_torch
from neural_layers.kernels.linear.reference import linear_reference


def _check(x: Tensor, weight: Tensor, bias: Tensor | None) -> None:
    check_floats(x=x, weight=weight, bias=bias)
    check_devices(x=x, weight=weight, bias=bias)
    if weight.ndim != 2 or x.ndim == 0 or x.shape[-1] != weight.shape[1]:
        raise ValueError(
            f"x has shape {tuple(x.shape)} and weight {tuple(weight.shape)}; expected (…, inputs), (outputs, inputs)"
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias has shape {tuple(bias.shape)}; expected {tuple(weight.shape[:1])}")


def _native_obstacle(x: Tensor, weight: Tensor, bias: Tensor | None) -> str | None:
    if torch.compiler.is_compiling():
        return "in a graph the product is torch's own"
    reason = c_library.obstacle(x, weight, bias)
    if reason is not None:
        return reason
    if not c_library.unwatched(x, weight, bias) or torch.is_autocast_enabled(x.device.type):
        return "it has no gradient, and knows nothing of autocast"
    if weight.dtype not in (torch.float32, torch.float64) or {x.dtype, weight.dtype} != {weight.dtype}:
        return "it takes float32 or float64, the same for x and weight"
    if not 0 < x.numel() <= MOST_ROWS * weight.shape[1]:
        return f"it takes 1 to {MOST_ROWS} rows"
    return None


_OP = Op(
    "linear",
    check=_check,
    backends=(
        Backend("native", linear_native, _native_obstacle, describe=c_library.describe, missing=c_library.MISSING),
        Backend("torch", linear_torch),
        Backend("reference", linear_reference),
    ),
)


def _are_many_plain_rows(x: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the arguments fit and are more rows than the C kernel takes: nearly every call in training, which then
    goes to torch without the questions and checks that cost as much as a small product."""
    if weight.ndim != 2 or x.numel() <= MOST_ROWS * weight.shape[1] or x.shape[-1:] != weight.shape[1:]:
        return False
    if x.dtype != weight.dtype or x.dtype not in FLOATS or x.device != weight.device:
        return False
    return bias is None or (
        bias.shape == weight.shape[:1] and bias.dtype == weight.dtype and bias.device == weight.device
    )


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, backend: str = "auto") -> Tensor:
    """x Wᵀ + bias.

    x: (..., inputs), weight: (outputs, inputs), bias: (outputs) or None, of one dtype. Returns (..., outputs).
    For few rows without a gradient the C kernel runs, which takes half the time of torch's product where W has short
    rows (384) and nine tenths where they are long (4,096); otherwise torch's product, which does as autocast says.
    Raises ValueError for shapes or devices that do not fit, TypeError for tensors that are not floats, BackendError for
    a backend that cannot run.
    """
    # A graph that is being traced would be bound to more, or to fewer, rows than the kernel takes.
    if backend == "auto" and not torch.compiler.is_compiling() and "linear" not in dispatch._forced:
        done = quick(x, weight, bias)
        if done is not None:
            return done
        if _are_many_plain_rows(x, weight, bias):
            return linear_torch(x, weight, bias)
    return _OP(backend, x, weight, bias)
