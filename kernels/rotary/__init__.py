"""Rotary position embedding."""

import torch
from torch import Tensor

from neural_layers.kernels import dispatch, triton_support
from neural_layers.kernels.arguments import FLOATS, check_devices, check_floats, match_shapes
from neural_layers.kernels.dispatch import Backend, Op
from neural_layers.kernels.rotary.fused import apply_rotary_triton
from neural_layers.kernels.rotary.pytorch import apply_rotary_torch
from neural_layers.kernels.rotary.reference import apply_rotary_reference


def _check(x: Tensor, cos: Tensor, sin: Tensor) -> None:
    check_floats(x=x, cos=cos, sin=sin)
    check_devices(x=x, cos=cos, sin=sin)
    sizes: dict[str, int] = {}
    match_shapes(sizes, "BTHK", x=x)
    if sizes["K"] % 2:
        raise ValueError(f"x has shape {tuple(x.shape)}; the head width K={sizes['K']} must be even")
    sizes["P"] = sizes["K"] // 2  # the pairs
    match_shapes(sizes, "TP" if cos.ndim == 2 else "BTP", cos=cos, sin=sin)


_OP = Op(
    "apply_rotary",
    check=_check,
    backends=(
        Backend("triton", apply_rotary_triton, triton_support.obstacle, triton_support.avoid),
        Backend("torch", apply_rotary_torch),
        Backend("reference", apply_rotary_reference),
    ),
)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor, *, backend: str = "auto") -> Tensor:
    """Rotate each pair (x[i], x[i + K/2]) by its angle (RoPE, arXiv 2104.09864, in half-split order).

    out[i] = x[i]·cos[i] − x[i + K/2]·sin[i];  out[i + K/2] = x[i + K/2]·cos[i] + x[i]·sin[i]

    x: (B, T, H, K) with K even; cos, sin: (T, K/2), or (B, T, K/2) where rows differ in their positions. The rotation
    is computed in float32 for half inputs. Returns (B, T, H, K) in the dtype of x.
    Raises ValueError for shapes that do not fit, TypeError for tensors that are not floats, BackendError for a backend
    that cannot run.
    """
    if backend == "auto" and "apply_rotary" not in dispatch._forced and _is_plain(x, cos, sin):
        return apply_rotary_torch(x, cos, sin)
    return _OP(backend, x, cos, sin)


def _is_plain(x: Tensor, cos: Tensor, sin: Tensor) -> bool:
    """Whether the arguments fit, on the CPU, with angles that rows share: what is asked here stands for all the checks
    of the op, which for a single token cost more than the rotation."""
    if torch.compiler.is_compiling() or not (x.is_cpu and cos.is_cpu and sin.is_cpu):
        return False
    if x.ndim != 4 or x.dtype not in FLOATS or cos.dtype not in FLOATS or sin.dtype != cos.dtype:
        return False
    _, length, _, width = x.shape
    return width % 2 == 0 and cos.shape == sin.shape == (length, width // 2)
