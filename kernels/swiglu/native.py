"""The gates of SwiGLU and GeGLU in C (backend `native`): native.c."""

from struct import Struct

import torch
from torch import Tensor

from neural_layers.kernels import c_library

_ACTIVATION = {"silu": 0, "gelu_tanh": 1, "gelu_erf": 2}
# dtype → the type of arithmetic, and how native.c reads the elements.
_DTYPES = {
    torch.float32: (torch.float32, 0),
    torch.float64: (torch.float64, 0),
    torch.bfloat16: (torch.float32, 1),
    torch.float16: (torch.float32, 2),
}
# The struct Gate of native.c.
_pack = Struct("6P9q").pack
# Rows shorter than this are copied together: each of them is a step of its own.
_LEAST_WIDTH = 64


def quick(gate: Tensor, up: Tensor, activation: str) -> Tensor | None:
    """activation(gate) · up in the plain case, or None where the case is another.

    Plain are contiguous tensors that fit and that nothing watches. What is asked here stands for all the checks of the
    op, which for a single token cost more than the gate.
    """
    shape, dtype = gate.shape, gate.dtype
    if not c_library.plain(gate, up) or up.shape != shape or up.dtype != dtype or dtype not in _DTYPES:
        return None
    out, count = torch.empty_like(gate), gate.numel()
    arithmetic, code = _DTYPES[dtype]
    addresses = (gate.data_ptr(), up.data_ptr(), 0, out.data_ptr(), 0, 0)
    sizes = (count, count, 0, 0, 0, 0, code, _ACTIVATION[activation], torch.get_num_threads())
    c_library.record_function("gate_forward", arithmetic)(_pack(*addresses, *sizes))
    return out


def forward(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """activation(gate) · up, contiguous; activation is "silu", "gelu_tanh" or "gelu_erf"."""
    (gate, up), sizes = _rows(gate, up)
    out = _empty_like(gate)
    arithmetic, code = _DTYPES[gate.dtype]
    addresses = (gate.data_ptr(), up.data_ptr(), 0, out.data_ptr(), 0, 0)
    run = c_library.record_function("gate_forward", arithmetic)
    run(_pack(*addresses, *sizes, 0, code, _ACTIVATION[activation], torch.get_num_threads()))
    return out


def backward(grad: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up, contiguous."""
    uniform = not grad.is_contiguous() and not any(grad.stride())  # the gradient of a sum
    (gate, up, *rest), sizes = _rows(gate, up) if uniform else _rows(gate, up, grad)
    grad = rest[0] if rest else grad
    grad_gate, grad_up = _empty_like(gate), _empty_like(gate)
    arithmetic, code = _DTYPES[gate.dtype]
    addresses = (gate.data_ptr(), up.data_ptr(), grad.data_ptr(), 0, grad_gate.data_ptr(), grad_up.data_ptr())
    run = c_library.record_function("gate_backward", arithmetic)
    run(_pack(*addresses, *sizes, uniform, code, _ACTIVATION[activation], torch.get_num_threads()))
    return grad_gate, grad_up


def _empty_like(tensor: Tensor) -> Tensor:
    # The quicker of the two, which keeps strides.
    return torch.empty_like(tensor) if tensor.is_contiguous() else tensor.new_empty(tensor.shape)


def _rows(*tensors: Tensor) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
    """The tensors as rows that lie evenly, which the halves of a fused projection do, copied where they do not; and
    count, width and the strides of gate, up and grad."""
    count = tensors[0].numel()
    for tensor in tensors:
        if not tensor.is_contiguous():
            break
    else:
        return tensors, (count, count, 0, 0, 0)
    width = tensors[0].shape[-1]
    found = [_row_stride(tensor) if width >= _LEAST_WIDTH else None for tensor in tensors]
    rows = tuple(t.contiguous() if stride is None else t for t, stride in zip(tensors, found, strict=True))
    strides = [width if stride is None else stride for stride in found]
    return rows, (count, width, *strides, *[0] * (3 - len(strides)))


def _row_stride(tensor: Tensor) -> int | None:
    """How far apart rows of neighbouring elements lie, or None where that differs."""
    if tensor.stride(-1) != 1:
        return None
    stride, reach = 0, 0
    for size, step in zip(reversed(tensor.shape[:-1]), reversed(tensor.stride()[:-1]), strict=True):
        if size == 1:
            continue
        if reach and step != reach:
            return None
        stride, reach = stride or step, step * size
    return stride
