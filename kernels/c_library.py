"""The C kernels: finding the library, choosing the variant for this processor, and calling into it.

One shared object, built from every `kernels/<op>/native*.c` when the package is installed (setup.py), holds each
function for each instruction set and for float and double arithmetic. It knows neither torch nor Python: a call passes
addresses, sizes and dtype codes (kernels/native.h).

`NEURAL_LAYERS_CPU=baseline|avx2|avx512` forces a variant; `NEURAL_LAYERS_NATIVE=PATH` loads
another build, as it is.
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
from torch._C._functorch import peek_interpreter_stack
from torch.compiler import is_compiling

from neural_layers.kernels.c_sources import digest, sources

VARIANTS = ("avx512", "avx2", "baseline")
_SLOWER = (
    "on the CPU, scans, convolutions, norms, gates, attention with windows, 4-bit ops and linear losses run on torch, "
    "up to 20 times slower"
)
_NOT_BUILT = f"the C kernels are not built: gcc or clang was missing when neural_layers was installed; {_SLOWER}"
_STALE = f"the C kernels were built from other sources than these; `make native` builds them again; {_SLOWER}"
# The codes of kernels/native.h. The type of arithmetic itself is 0.
_CODES = {torch.bfloat16: 1, torch.float16: 2, torch.float32: 3}


def _load() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None; and why there is none."""
    folder, named = Path(__file__).parent, os.environ.get("NEURAL_LAYERS_NATIVE")
    if named:
        return ctypes.CDLL(named), _NOT_BUILT
    built = sorted(folder.glob("_native*.so"), key=lambda path: path.stat().st_mtime)
    if not built:
        return None, _NOT_BUILT
    library = ctypes.CDLL(str(built[-1]))
    built_from = ctypes.string_at(ctypes.addressof(ctypes.c_char.in_dll(library, "neural_layers_sources"))).decode()
    # An installed package has no sources beside it.
    return (None, _STALE) if sources(folder) and built_from != digest(folder) else (library, _NOT_BUILT)


_LIBRARY, MISSING = _load()


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
    for tensor in tensors:
        if tensor is not None and not tensor.is_cpu:
            return "the C kernels run on the CPU only"
    if not is_compiling() and (peek_interpreter_stack() is not None or forward_ad._current_level >= 0):
        return "transforms of torch.func and forward-mode derivatives do not pass through the C kernels"
    return None if _LIBRARY is not None else MISSING


def describe() -> str:
    """The variant, for `explain`."""
    return VARIANT


@cache
def function(name: str, dtype: torch.dtype) -> Callable[..., None]:
    """The exported function with arithmetic in `dtype`, float32 or float64.

    Each argument is passed as its Python type says: int and bool as int64_t, float as double, a tensor as its address,
    None as a null pointer, a structure as its address. The types are those of the first call.
    """
    exported = _exported(name, dtype)

    def call(*arguments: Any) -> None:
        if exported.argtypes is None:  # told once, because making a ctypes object of each argument takes twice as long
            exported.argtypes = [_ctype(argument) for argument in arguments]
        exported(*[_value(argument) for argument in arguments])

    return call


@cache
def record_function(name: str, dtype: torch.dtype) -> Callable[[bytes], None]:
    """The exported function with arithmetic in `dtype` that takes the address of a record, given as the bytes that
    `struct` packs. Such a call takes 0.8 µs, packing included, where a dozen arguments take 2."""
    exported = _exported(name, dtype)
    exported.argtypes = [ctypes.c_void_p]
    return exported


def _exported(name: str, dtype: torch.dtype) -> Any:
    real = {torch.float32: "f32", torch.float64: "f64"}[dtype]
    exported = getattr(_LIBRARY, f"{name}_{real}_{VARIANT}", None)
    if exported is None:
        raise RuntimeError(
            f"the C library is older than its sources: it lacks {name}; build it again with `make native`"
        )
    exported.restype = None
    return exported


def _ctype(argument: Any) -> Any:
    if isinstance(argument, float):
        return ctypes.c_double
    return ctypes.c_int64 if isinstance(argument, int) else ctypes.c_void_p


def _value(argument: Any) -> Any:
    if isinstance(argument, Tensor):
        return argument.data_ptr()
    return ctypes.byref(argument) if isinstance(argument, ctypes.Structure) else argument


def code(tensor: Tensor | None, arithmetic: torch.dtype) -> int:
    """How a kernel with that arithmetic reads the tensor's elements."""
    return 0 if tensor is None or tensor.dtype == arithmetic else _CODES[tensor.dtype]


def unwatched(*tensors: Tensor | None) -> bool:
    """Whether nothing watches a call: no gradient is wanted, no graph is being traced, no transform is active.

    A kernel may then be called directly. Passing through torch's dispatcher costs some 10 µs in Python, which is more
    than the work of a decoding step.
    """
    if not autograd_alone(*tensors):
        return False
    if torch.is_grad_enabled():
        for tensor in tensors:
            if tensor is not None and tensor.requires_grad:
                return False
    return True


def autograd_alone(*tensors: Tensor | None) -> bool:
    """Whether nothing but autograd watches a call: no graph is being traced, no transform is active.

    A function of `differentiable` may then serve, which costs a third of a custom op with a gradient.
    """
    if is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    if peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        return False
    for tensor in tensors:
        if type(tensor) is not Tensor and tensor is not None and type(tensor) is not torch.nn.Parameter:
            return False
    return True


def plain(*tensors: Tensor | None) -> bool:
    """Whether the C kernels can take these tensors where they are, and nothing watches: what `obstacle` and `unwatched`
    ask, and whether the tensors are contiguous, in one go.

    An op may ask this before anything else, so that a decoding step does not spend most of its time on questions.
    """
    if _LIBRARY is None or is_compiling() or torch._C._len_torch_dispatch_stack():
        return False
    if peek_interpreter_stack() is not None or forward_ad._current_level >= 0:
        return False
    wants_gradient = torch.is_grad_enabled()
    for tensor in tensors:
        if tensor is None:
            continue
        if type(tensor) is not Tensor and type(tensor) is not torch.nn.Parameter:
            return False
        if not tensor.is_cpu or not tensor.is_contiguous() or (wants_gradient and tensor.requires_grad):
            return False
    return True


def differentiable(
    forward: Callable[..., Any], save: Callable[..., None], differentiate: Callable[..., Any]
) -> Callable[..., Any]:
    """`forward` for autograd, from what a custom op is given in `register_autograd`: `save`(ctx, inputs, output) and
    `differentiate`(ctx, *grads)."""

    class Differentiable(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *inputs: Any) -> Any:
            output = forward(*inputs)
            save(ctx, inputs, output)
            return output

        @staticmethod
        def backward(ctx: Any, *grads: Any) -> Any:
            return differentiate(ctx, *grads)

    return Differentiable.apply
