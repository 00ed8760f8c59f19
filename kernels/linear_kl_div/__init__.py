"""The divergence of a student's output distribution from a teacher's, from the inputs of their last layers."""

import math
from functools import partial

import torch
from torch import Tensor

from neural_layers.kernels import c_library
from neural_layers.kernels.arguments import check_devices
from neural_layers.kernels.chunked_loss import check_chunk_size, check_head
from neural_layers.kernels.chunked_loss.native import native_avoid
from neural_layers.kernels.dispatch import Backend, Op
from neural_layers.kernels.linear_kl_div.fused import linear_kl_div_fused
from neural_layers.kernels.linear_kl_div.reference import linear_kl_div_reference
from neural_layers.kernels.triton_support import avoid, obstacle


def _check(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    temperature: float,
    mask: Tensor | None,
    chunk_size: int | None,
) -> None:
    student = {"student_hidden": student_hidden, "student_weight": student_weight}
    teacher = {"teacher_hidden": teacher_hidden, "teacher_weight": teacher_weight}
    check_head(**student)
    check_head(**teacher)
    check_devices(**student, **teacher, mask=mask)
    check_chunk_size(chunk_size)
    shape = student_hidden.shape[:-1]
    if teacher_hidden.shape[:-1] != shape:
        raise ValueError(
            f"teacher_hidden has shape {tuple(teacher_hidden.shape)}; expected (*{tuple(shape)}, D) for student_hidden "
            f"of shape {tuple(student_hidden.shape)}"
        )
    if student_weight.shape[0] != teacher_weight.shape[0]:
        raise ValueError(
            f"the student's vocabulary has V={student_weight.shape[0]} entries, the teacher's "
            f"{teacher_weight.shape[0]}; both must share one vocabulary"
        )
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature={temperature} must be positive and finite")
    if mask is not None and mask.dtype != torch.bool:
        raise TypeError(f"mask has dtype {mask.dtype}; expected torch.bool")
    if mask is not None and mask.shape != shape:
        raise ValueError(f"mask has shape {tuple(mask.shape)}; expected {tuple(shape)}")


def _native_obstacle(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    temperature: float,
    mask: Tensor | None,
    chunk_size: int | None,
) -> str | None:
    return c_library.obstacle(student_hidden, student_weight, teacher_hidden, teacher_weight, mask)


_OP = Op(
    "linear_kl_div",
    check=_check,
    backends=(
        Backend(
            "native",
            partial(linear_kl_div_fused, backend="native"),
            _native_obstacle,
            native_avoid,
            describe=c_library.describe,
            missing=c_library.MISSING,
        ),
        Backend("triton", partial(linear_kl_div_fused, backend="triton"), obstacle, avoid),
        Backend("torch", partial(linear_kl_div_fused, backend="torch")),
        Backend("reference", linear_kl_div_reference),
    ),
)


def linear_kl_div(
    student_hidden: Tensor,
    student_weight: Tensor,
    teacher_hidden: Tensor,
    teacher_weight: Tensor,
    *,
    temperature: float = 1.0,
    mask: Tensor | None = None,
    chunk_size: int | None = None,
    backend: str = "auto",
) -> Tensor:
    """T² · KL(teacher ‖ student) of the softmaxes of logits / T, which are never there for more than a chunk of tokens.

    T² · mean over the tokens that count of Σ_v p_v (log p_v − log q_v) with p = softmax(teacher_hidden @
    teacher_weight.T / T), q the same of the student, T = temperature (arXiv 1503.02531). The tokens that do not count
    take no part, whatever they hold, and cost nothing.

    student_hidden: (..., D), student_weight: (V, D), float64 to float16, in any mixture
    teacher_hidden: (..., E), teacher_weight: (V, E), of the teacher's own width
    mask:           (...) of bool, true for a token that counts; all do where left out
    chunk_size:     the most tokens at once; by default 256, and fewer for a vocabulary above 131,072

    Returns a number, float64 where an argument is float64 and float32 otherwise, as are the logits, the sums and the
    weights' gradients until they are complete. It is NaN where no token counts, with gradients of zero.

    All four tensors have gradients; a teacher's cost two products more, and are made only for those that require them.
    They are made in the forward pass, and kept: as many numbers as the tensors have that require them
    (arXiv 2410.10989). The backward pass of a retained graph makes them again from the second time on.
    Gradients of gradients need `backend="reference"`; the others raise NotImplementedError.
    Raises ValueError for shapes, vocabularies or devices that do not fit, for a temperature or a chunk size out of
    range, TypeError for wrong dtypes, BackendError for a backend that cannot run.
    """
    return _OP(
        backend,
        student_hidden,
        student_weight,
        teacher_hidden,
        teacher_weight,
        temperature=temperature,
        mask=mask,
        chunk_size=chunk_size,
    )
