"""The C kernels: finding the library, choosing the variant for this processor, and calling into it.

One shared object, built from every `kernels/<op>/native*.c` when the package is installed (setup.py), holds each function
for each instruction set and for float and double arithmetic. It knows neither torch nor Python: a call passes addresses,
sizes and dtype codes (kernels/native.h).

`NEURAL_LAYERS_CPU=baseline|avx2|avx512` forces a variant; `NEURAL_LAYERS_NATIVE=PATH` loads another build.
"""

import ctypes
import os
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

VARIANTS = ("avx512", "avx2", "baseline")
MISSING = (
    "the C kernels are not built: gcc or clang was missing when neural_layers was installed; on the CPU, scans, "
    "convolutions, norms, gates and 4-bit ops run on torch, 2 to 20 times slower"
)
# The codes of kernels/native.h. The type of arithmetic itself is 0.
_CODES = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}


def _find() -> ctypes.CDLL | None:
    named = os.environ.get("NEURAL_LAYERS_NATIVE")
    if named:
        return ctypes.CDLL(named)
    built = sorted(Path(__file__).parent.glob("_native*.so"), key=lambda path: path.stat().st_mtime)
    return ctypes.CDLL(str(built[-1])) if built else None


_LIBRARY = _find()


def runs(variant: str) -> bool:
    """Whether the library is there and this processor runs its variant."""
    return _LIBRARY is not None and bool(_LIBRARY.neural_layers_cpu_runs(variant.encode()))


def _choose() -> str:
    """The best variant that this processor runs, or the one that NEURAL_LAYERS_CPU names."""
    wanted = os.environ.get("NEURAL_LAYERS_CPU")
    if wanted and wanted not in VARIANTS:
        raise ValueError(f"NEURAL_LAYERS_CPU={wanted!r} is not one of {', '.join(VARIANTS)}")
    if _LIBRARY is None:
        return ""
    for variant in [wanted] if wanted else VARIANTS:
        if runs(variant):
            return variant
    raise ValueError(f"NEURAL_LAYERS_CPU={wanted!r} needs instructions that this processor does not have")


VARIANT = _choose()


def obstacle(*tensors: Tensor | None) -> str | None:
    """Why the C kernels cannot take these tensors, or None."""
    if any(tensor is not None and tensor.device.type != "cpu" for tensor in tensors):
        return "the C kernels run on the CPU only"
    return None if _LIBRARY is not None else MISSING


def describe() -> str:
    """The variant, for `explain`."""
    return VARIANT


@cache
def function(name: str, dtype: torch.dtype) -> Callable[..., None]:
    """The exported function with arithmetic in `dtype`, float32 or float64.

    Each argument is passed as its Python type says: int and bool as int64_t, float as double, a tensor as its address,
    None as a null pointer.
    """
    real = {torch.float32: "f32", torch.float64: "f64"}[dtype]
    exported = getattr(_LIBRARY, f"{name}_{real}_{VARIANT}", None)
    if exported is None:
        raise RuntimeError(
            f"the C library is older than its sources: it lacks {name}; build it again with `make native`"
        )
    exported.restype = None

    def call(*arguments: Any) -> None:
        exported(*map(_pass, arguments))

    return call


def _pass(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    if isinstance(argument, float):
        return ctypes.c_double(argument)
    return argument if argument is None else ctypes.c_int64(argument)


def code(tensor: Tensor | None, arithmetic: torch.dtype) -> int:
    """How a kernel with that arithmetic reads the tensor's elements."""
    return 0 if tensor is None or tensor.dtype == arithmetic else _CODES[tensor.dtype]


def unwatched(*tensors: Tensor | None) -> bool:
    """Whether nothing watches a call: no gradient is wanted, no graph is being traced, no transform is active.

    A kernel may then be called directly. Passing through torch's dispatcher costs some 10 µs in Python, which is more
    than the work of a decoding step.
    """
    if torch.compiler.is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    if torch._C._functorch.peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        return False
    wants_gradient = torch.is_grad_enabled()
    return all(
        tensor is None or (type(tensor) in _PLAIN and not (wants_gradient and tensor.requires_grad))
        for tensor in tensors
    )


_PLAIN = (Tensor, torch.nn.Parameter)
