"""The cross-entropy of a linear layer's outputs, from its inputs."""

from functools import partial

import torch
from torch import Tensor

from neural_layers.kernels import c_library
from neural_layers.kernels.arguments import check_devices
from neural_layers.kernels.chunked_loss import check_chunk_size, check_head
from neural_layers.kernels.chunked_loss.native import native_avoid
from neural_layers.kernels.dispatch import Backend, Op
from neural_layers.kernels.linear_cross_entropy.fused import linear_cross_entropy_fused
from neural_layers.kernels.linear_cross_entropy.reference import linear_cross_entropy_reference
from neural_layers.kernels.triton_support import avoid, obstacle


def _check(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    ignore_index: int,
    label_smoothing: float,
    chunk_size: int | None,
) -> None:
    check_head(hidden=hidden, weight=weight)
    check_devices(hidden=hidden, weight=weight, target=target)
    check_chunk_size(chunk_size)
    if target.dtype != torch.int64:
        raise TypeError(f"target has dtype {target.dtype}; expected torch.int64")
    if target.shape != hidden.shape[:-1]:
        raise ValueError(
            f"target has shape {tuple(target.shape)}; expected {tuple(hidden.shape[:-1])} for hidden of shape "
            f"{tuple(hidden.shape)}"
        )
    if not 0 <= label_smoothing <= 1:
        raise ValueError(f"label_smoothing={label_smoothing} must lie in [0, 1]")


def _native_obstacle(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    ignore_index: int,
    label_smoothing: float,
    chunk_size: int | None,
) -> str | None:
    return c_library.obstacle(hidden, weight, target)


_OP = Op(
    "linear_cross_entropy",
    check=_check,
    backends=(
        Backend(
            "native",
            partial(linear_cross_entropy_fused, backend="native"),
            _native_obstacle,
            native_avoid,
            describe=c_library.describe,
            missing=c_library.MISSING,
        ),
        Backend(
            "triton",
            partial(linear_cross_entropy_fused, backend="triton"),
            obstacle,
            avoid,
        ),
        Backend("torch", partial(linear_cross_entropy_fused, backend="torch")),
        Backend("reference", linear_cross_entropy_reference),
    ),
)


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    chunk_size: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """Cross-entropy of the logits hidden @ weight.T, of which there are never more than those of a chunk of tokens.

    −mean over the tokens that count of (1 − ε) log p[target] + ε · mean over v of log p[v], p = softmax(hidden @
    weight.T)
    with ε = label_smoothing (arXiv 1512.00567). A token counts whose target is not `ignore_index`; the others take no
    part, whatever they hold, and cost nothing.

    hidden:     (..., D), weight: (V, D), float64 to float16, in any mixture
    target:     (...) of int64, 0 ≤ target < V or `ignore_index`
    chunk_size: the most tokens at once; by default 256, and fewer for a vocabulary above 131,072

    Returns a number, float64 where an argument is float64 and float32 otherwise, as are the logits, the sums and the
    weight's gradient until it is complete. As with torch.nn.functional.cross_entropy it is NaN where no token counts,
    with gradients of zero.

    Where gradients are wanted they are made in the forward pass, and kept: D numbers for each token and as many as the
    weight has (arXiv 2410.10989). The backward pass of a retained graph makes them again from the second time on.
    Gradients of gradients need `backend="reference"`; the others raise NotImplementedError.
    Raises ValueError for shapes or devices that do not fit, for a target, a smoothing or a chunk size out of range,
    TypeError for wrong dtypes, BackendError for a backend that cannot run. Targets are looked at when the op runs, also
    in a compiled graph; in one that `backend="reference"` was traced into, torch's own error stands for it.
    """
    return _OP(
        backend,
        hidden,
        weight,
        target,
        ignore_index=ignore_index,
        label_smoothing=label_smoothing,
        chunk_size=chunk_size,
    )
