"""Triton kernels of the gates activation(gate) · up: silu (SwiGLU) and the two gelus (GeGLU).

They are bound by memory. Each program handles a stretch of one row, 4 KiB of every tensor, so that each thread has
several loads of 16 bytes in flight. Contiguous tensors are one long row; the halves of a fused projection, whose rows
lie apart, are read where they are.

Letters: M rows, F columns.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

from itertools import pairwise

import triton
import triton.language as tl
from torch import Tensor

from neural_layers.kernels.triton_math import sigmoid
from neural_layers.kernels.triton_support import LAUNCH, accumulator, on_device

BLOCK_BYTES, WARPS = 4096, 4


@triton.jit
def _silu(x):
    """x·σ(x) and its derivative σ + x·σ·(1 − σ)."""
    s = sigmoid(x)
    return x * s, s + x * s * (1 - s)


@triton.jit
def _gelu_tanh(x):
    """x·p with p = (1 + tanh u)/2 = σ(2u), u = √(2/π)(x + 0.044715 x³), and its derivative p + 2x·p(1 − p)·u′."""
    twice_root: tl.constexpr = 1.5957691216057308  # 2√(2/π); without the annotation it would become float32
    p = sigmoid(twice_root * x * (1 + 0.044715 * x * x))
    return x * p, p + x * p * (1 - p) * twice_root * (1 + 0.134145 * x * x)


@triton.jit
def _gelu_erf(x):
    """x·Φ(x) and its derivative Φ(x) + x·φ(x), with φ the density of the normal distribution."""
    p = 0.5 * (1 + tl.erf(x * 0.7071067811865476))
    return x * p, p + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)  # 1/√(2π)


@triton.jit
def _activate(x, ACTIVATION: tl.constexpr):
    if ACTIVATION == "silu":
        value, slope = _silu(x)
    elif ACTIVATION == "gelu_tanh":
        value, slope = _gelu_tanh(x)
    else:
        value, slope = _gelu_erf(x)
    return value, slope


@triton.jit
def _stretch(columns, BLOCK: tl.constexpr):
    """The row of this program, its columns and which of them exist."""
    stretches = tl.cdiv(columns, BLOCK)
    program = tl.program_id(0).to(tl.int64)
    row = program // stretches
    column = (program - row * stretches) * BLOCK + tl.arange(0, BLOCK)
    return row, column, column < columns


@triton.jit
def _gate_forward(
    gate, up, out, columns, gate_stride, up_stride, ACTIVATION: tl.constexpr, ACC: tl.constexpr, BLOCK: tl.constexpr
):
    """out = activation(gate) · up. Reads 2 elements and writes 1: 6 bytes in bfloat16, for about 10 operations."""
    row, column, exists = _stretch(columns, BLOCK)
    g = tl.load(gate + row * gate_stride + column, exists, other=0.0).to(ACC)
    u = tl.load(up + row * up_stride + column, exists, other=0.0).to(ACC)
    value, _ = _activate(g, ACTIVATION)
    tl.store(out + row * columns + column, value * u, exists)


@triton.jit
def _gate_backward(
    grad,
    gate,
    up,
    grad_gate,
    grad_up,
    columns,
    grad_stride,
    gate_stride,
    up_stride,
    ACTIVATION: tl.constexpr,
    ACC: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """grad_gate = grad·up·activation′(gate), grad_up = grad·activation(gate).

    Reads 3 elements and writes 2: 10 bytes in bfloat16, for about 15 operations. Nothing was saved by the forward.
    """
    row, column, exists = _stretch(columns, BLOCK)
    d = tl.load(grad + row * grad_stride + column, exists, other=0.0).to(ACC)
    g = tl.load(gate + row * gate_stride + column, exists, other=0.0).to(ACC)
    u = tl.load(up + row * up_stride + column, exists, other=0.0).to(ACC)
    value, slope = _activate(g, ACTIVATION)
    tl.store(grad_gate + row * columns + column, d * u * slope, exists)
    tl.store(grad_up + row * columns + column, d * value, exists)


def gate_forward(gate: Tensor, up: Tensor, activation: str) -> Tensor:
    """activation(gate) · up, contiguous; activation is "silu", "gelu_tanh" or "gelu_erf"."""
    out = gate.new_empty(gate.shape)
    if out.numel():
        (gate, up), columns, grid, block = _rows(gate, up)
        with on_device(gate):
            _gate_forward[grid](
                gate, up, out, columns, gate.stride(0), up.stride(0), activation, accumulator(gate), block,
                num_warps=WARPS, **LAUNCH,
            )  # fmt: skip
    return out


def gate_backward(grad: Tensor, gate: Tensor, up: Tensor, activation: str) -> tuple[Tensor, Tensor]:
    """The gradients of gate and up, contiguous."""
    grad_gate, grad_up = gate.new_empty(gate.shape), up.new_empty(up.shape)
    if grad_gate.numel():
        (grad, gate, up), columns, grid, block = _rows(grad, gate, up)
        with on_device(gate):
            _gate_backward[grid](
                grad, gate, up, grad_gate, grad_up, columns, grad.stride(0), gate.stride(0), up.stride(0),
                activation, accumulator(gate), block,
                num_warps=WARPS, **LAUNCH,
            )  # fmt: skip
    return grad_gate, grad_up


def _rows(*tensors: Tensor) -> tuple[list[Tensor], int, tuple[int], int]:
    """The tensors as (M, F) with neighbouring columns, F, the grid, and the block."""
    block = BLOCK_BYTES // tensors[0].element_size()
    width = tensors[0].shape[-1] if tensors[0].ndim else 1
    # Rows far shorter than a block would leave most of it idle, so that copying first is the faster way.
    if width * 4 < block or not all(map(_is_rows, tensors)):
        tensors = tuple(tensor.contiguous() for tensor in tensors)
    if all(tensor.is_contiguous() for tensor in tensors):
        rows = [tensor.view(1, -1) for tensor in tensors]
    else:
        rows = [tensor.view(-1, width) for tensor in tensors]
    count, columns = rows[0].shape
    return rows, columns, (count * triton.cdiv(columns, block),), block


def _is_rows(tensor: Tensor) -> bool:
    """Whether the tensor can be viewed as (M, F) with neighbouring columns."""
    if tensor.stride(-1) != 1:
        return False
    leading = [(size, stride) for size, stride in zip(tensor.shape[:-1], tensor.stride()[:-1], strict=True) if size > 1]
    return all(outer[1] == inner[0] * inner[1] for outer, inner in pairwise(leading))
