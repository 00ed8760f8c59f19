"""The selective scan in C (backend `native`): native.c, native_backward.c, scan.h."""

import ctypes

import torch
from torch import Tensor

from neural_layers.kernels import c_library
from neural_layers.kernels.arguments import accumulation_dtype
from neural_layers.kernels.selective_scan.chunks import CHUNK

# As in scan.h: channels of a task, for each of which the gradients of B and C have a part of their own.
_BLOCK = 64


class _Sequence(ctypes.Structure):
    """(B, T, …) with a contiguous last dimension."""

    _fields_ = [("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("row", "step", "dtype"))]


class _Scan(ctypes.Structure):
    """The struct Scan of scan.h."""

    _fields_ = [
        *((n, _Sequence) for n in ("u", "delta", "z", "y", "B", "C", "grad_y", "grad_u", "grad_delta", "grad_z")),
        *((n, ctypes.c_void_p) for n in ("A", "D", "bias", "initial", "starts", "borders", "final", "grad_final")),
        *((n, ctypes.c_void_p) for n in ("grad_A", "grad_initial", "grad_B", "grad_C", "grad_D", "grad_bias")),
        *((n, ctypes.c_int64) for n in ("batch", "length", "width", "states", "softplus", "threads")),
    ]


class _Call:
    """The arguments of one call in C, and the tensors made for it, which live as long as the call."""

    def __init__(self, u: Tensor, A: Tensor, softplus: bool, dtype: torch.dtype) -> None:
        (batch, length, width), states = u.shape, A.shape[1]
        self.dtype, self.kept = dtype, list[Tensor]()
        self.scan = _Scan(
            batch=batch, length=length, width=width, states=states, softplus=softplus, threads=torch.get_num_threads()
        )

    def sequences(self, **tensors: Tensor | None) -> None:
        """Sequences that are read and written in their own dtype."""
        for name, tensor in tensors.items():
            if tensor is not None:
                tensor = tensor if tensor.stride(-1) == 1 else tensor.contiguous()
                self.kept.append(tensor)
                code = c_library.code(tensor, self.dtype)
                setattr(self.scan, name, _Sequence(tensor.data_ptr(), tensor.stride(0), tensor.stride(1), code))

    def arrays(self, **tensors: Tensor | None) -> None:
        """Tensors of the type of arithmetic."""
        for name, tensor in tensors.items():
            if tensor is not None:
                tensor = tensor.to(self.dtype).contiguous()
                self.kept.append(tensor)
                setattr(self.scan, name, tensor.data_ptr())

    def starts(self, seq_idx: Tensor | None) -> None:
        """Where documents begin, but for the first token, whose state is the initial one."""
        if seq_idx is not None:
            starts = torch.nn.functional.pad(seq_idx[:, 1:] != seq_idx[:, :-1], (1, 0))[
                :, : seq_idx.shape[1]
            ].contiguous()
            self.kept.append(starts)
            self.scan.starts = starts.data_ptr()

    def run(self, name: str) -> None:
        """Call the function of the C library."""
        c_library.function(name, self.dtype)(self.scan)


def forward(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    delta_softplus: bool,
    keep_borders: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """y (B, T, E), the final state (B, E, N), and the states at the borders of the chunks (J + 1, B, N, E) if kept."""
    dtype = accumulation_dtype(u, delta, A, B, C, D, z, delta_bias, initial_state)
    (batch, length, width), states = u.shape, A.shape[1]
    y, final = u.new_empty(u.shape), u.new_empty(batch, width, states, dtype=dtype)
    chunks = -(-length // CHUNK)
    borders = u.new_empty(chunks + 1 if keep_borders else 0, batch, states, width, dtype=dtype)
    call = _Call(u, A, delta_softplus, dtype)
    call.sequences(u=u, delta=delta, z=z, y=y, B=B, C=C)
    call.arrays(
        A=A, D=D, bias=delta_bias, initial=initial_state, final=final, borders=borders if keep_borders else None
    )
    call.starts(seq_idx)
    call.run("selective_scan_forward")
    return y, final, borders


def backward(
    grad_y: Tensor,
    grad_final_state: Tensor | None,
    borders: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    delta_bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    delta_softplus: bool,
) -> list[Tensor]:
    """The gradients of u, delta, A, B, C, and of D, z, delta_bias, initial_state where given."""
    dtype, (batch, length, width), states = borders.dtype, u.shape, A.shape[1]
    new = lambda *shape: borders.new_empty(shape)  # noqa: E731
    blocks = -(-width // _BLOCK)
    grad_u, grad_delta = u.new_empty(u.shape), delta.new_empty(u.shape)
    grad_z = None if z is None else z.new_empty(z.shape)
    grad_A, grad_initial = new(batch, width, states), None if initial_state is None else new(batch, width, states)
    grad_B, grad_C = new(blocks, batch, length, states), new(blocks, batch, length, states)
    grad_D, grad_bias = new(batch, width), new(batch, width)

    call = _Call(u, A, delta_softplus, dtype)
    call.sequences(u=u, delta=delta, z=z, B=B, C=C, grad_y=grad_y, grad_u=grad_u, grad_delta=grad_delta, grad_z=grad_z)
    call.arrays(A=A, D=D, bias=delta_bias, borders=borders, grad_final=grad_final_state)
    call.arrays(grad_A=grad_A, grad_initial=grad_initial, grad_B=grad_B, grad_C=grad_C)
    call.arrays(grad_D=grad_D, grad_bias=grad_bias)
    call.starts(seq_idx)
    call.run("selective_scan_backward")

    gradients = [grad_u, grad_delta, grad_A.sum(0).to(A.dtype), grad_B.sum(0).to(B.dtype), grad_C.sum(0).to(C.dtype)]
    gradients += [] if D is None else [grad_D.sum(0).to(D.dtype)]
    gradients += [] if grad_z is None else [grad_z]
    gradients += [] if delta_bias is None else [grad_bias.sum(0).to(delta_bias.dtype)]
    gradients += [] if initial_state is None or grad_initial is None else [grad_initial.to(initial_state.dtype)]
    return gradients
