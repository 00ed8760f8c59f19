"""Calling a C kernel whose weight stays the same from call to call, without asking the same questions each time.

An op checks its arguments in some 20 µs, which is more than a layer of a small model computes for a single token. What
is true of a weight is asked once here; of a call, that it is the plain case, in 2 µs.
"""

from collections.abc import Mapping
from struct import Struct

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor
from torch._C._functorch import peek_interpreter_stack

from neural_layers.kernels import dispatch
from neural_layers.kernels.c_library import VARIANT, record_function

# What the records of these kernels begin with: x, y, rows, threads, the code of their dtype.
head = Struct("2P3q").pack
Tensors = tuple[Tensor | None, ...]
# Of kernels with float arithmetic; see native.h.
FLOATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class Prepared:
    """y = f(x) for x (…, inputs) and y (…, outputs) of one dtype, in C.

    function:  the name of a kernel with float arithmetic, whose record is `head` and `constants`
    tensors:   the weight, its scales, the bias: contiguous, on the CPU, as `constants` has their addresses
    dtypes:    of x, with their codes; `FLOATS` or some of them
    most_rows: that the kernel takes
    threads_from: rows, for which threads are worth their start
    """

    def __init__(
        self,
        function: str,
        tensors: Tensors,
        constants: bytes,
        sizes: tuple[int, int],
        dtypes: Mapping[torch.dtype, int],
        *,
        most_rows: int = 1 << 40,
        threads_from: int = 1,
    ) -> None:
        self.run = record_function(function, torch.float32)
        self.tensors, self.constants, self.dtypes = tensors, constants, dtypes
        self.addresses = [0 if tensor is None else tensor.data_ptr() for tensor in tensors]
        self.inputs, self.outputs = sizes
        self.most_rows, self.threads_from = most_rows, threads_from

    def holds(self, tensors: Tensors) -> bool:
        """Whether these are the very tensors that were checked, at the same place."""
        for tensor, own, address in zip(tensors, self.tensors, self.addresses, strict=True):
            if tensor is not own or (tensor is not None and tensor.data_ptr() != address):
                return False
        return True

    def __call__(self, x: Tensor) -> Tensor | None:
        """y, or None where the call is not the plain one: contiguous rows on the CPU that nothing watches."""
        code = self.dtypes.get(x.dtype)
        if code is None or type(x) is not Tensor or not x.is_cpu or not x.is_contiguous():
            return None
        shape = x.shape
        if not shape or shape[-1] != self.inputs or not self.inputs:
            return None
        rows = x.numel() // self.inputs
        if not 0 < rows <= self.most_rows or watched(x, *self.tensors):
            return None
        y = x.new_empty((*shape[:-1], self.outputs))
        threads = torch.get_num_threads() if rows >= self.threads_from else 1
        self.run(head(x.data_ptr(), y.data_ptr(), rows, threads, code) + self.constants)
        return y

    def __deepcopy__(self, memo: object) -> None:
        """Nothing: the copy of a module has other tensors, and prepares itself."""

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return type(None), ()


def watched(*tensors: Tensor | None) -> bool:
    """Whether anything watches a call, or decides on it: a gradient, a transform, a mode, autocast, `use_backend`."""
    if dispatch._forced or torch._C._len_torch_dispatch_stack() or torch.is_autocast_enabled("cpu"):
        return True
    if peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        return True
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return True
    return False


def is_preparable(*tensors: Tensor | None) -> bool:
    """Whether the C kernels are there, and the tensors of a layer are contiguous on the CPU and of no class of their
    own."""
    return bool(VARIANT) and all(
        tensor is None or (type(tensor) in (Tensor, torch.nn.Parameter) and tensor.is_cpu and tensor.is_contiguous())
        for tensor in tensors
    )
