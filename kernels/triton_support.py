"""What every Triton backend shares, without importing triton: whether it can run here, and on how many processors.

Triton is optional and slow to import, so `import neural_layers` never loads it. Files that hold kernels import it at
their top, and are themselves imported only when a kernel is about to run.

How an op gets a Triton backend:

1. `kernels/<op>/triton_forward.py` and `triton_backward.py` (one `triton_kernels.py` where both are short; never
   `triton.py`) hold the `@triton.jit` kernels and the host functions `forward(...)`, `backward(...)`, which take and
   return tensors, allocate, choose the blocks and launch. Launch within `with on_device(x):`, because Triton launches
   on the current device, and with the options `**LAUNCH`. Return early where there is nothing to launch: a grid must
   not be empty.
2. `kernels/<op>/fused.py` holds the op as torch sees it: a forward and a backward `torch.library.custom_op` whose last
   argument names the implementation. Enter the host functions into its `IMPLEMENTATIONS`:
   `"triton": (deferred("<op>.triton_forward", "forward"), deferred("<op>.triton_backward", "backward"))`.
3. In the op's `__init__.py`: `Backend("triton", run=..., obstacle=obstacle, avoid=avoid)` between `native` and `torch`,
   with `obstacle` and `avoid` from here. An argument that the kernels cannot honour is a reason of the op's own:
   `lambda *a, **k: obstacle(*a, **k) or own_reason(*a, **k)`.
4. Enter the op's main configurations into `tests/triton/launches.py`: `make aot` compiles each launch of the host
   functions for every target on meta tensors, and checks shared memory and spills. The host functions must therefore
   not read a tensor's values.
5. Test values and gradients in `tests/triton/test_<op>.py`, which runs on the GPU where there is one and in Triton's
   interpreter where there is none.

How a kernel is written:

- Cast right after `tl.load` (`.to(ACC)`, with `ACC=accumulator(...)` as a `tl.constexpr`); `tl.store` casts back by
  itself: bfloat16 arithmetic is wrong in the interpreter, and the tests' interpreter refuses it.
- A float constant with a name is annotated (`root: tl.constexpr = 0.5`), or it would become float32; the tensor stands
  first in a product with a `tl.constexpr` of the module, which the interpreter cannot multiply by a tensor.
- Offsets of rows are 64-bit: `tl.program_id(0).to(tl.int64)`; a tensor may have more than 2³¹ elements. The variable of
  a loop is an ordinary int in the interpreter and has no `.to`: let its start be 64-bit.
- No atomics: partial sums for each program, added in a fixed order, so that a backward gives the same bits again.
- No `tl.make_block_ptr` and no libdevice, which the interpreter lacks; no `autotune` where a heuristic serves.
- `tl.exp2` is one instruction of a GPU; `tl.exp` takes four. `triton_math.py` holds the functions that kernels share.
- Windows and sums of several registers are tuples in `tl.static_range` loops (see `causal_conv1d/triton_backward.py`).
- Kernels have no types that mypy knows: the file says `# mypy: allow-untyped-defs, allow-incomplete-defs`, and where
  tuples grow `disable-error-code="assignment, var-annotated"`; its host functions stay typed.
- The docstring counts bytes and operations.
"""

import importlib.util
import os
import sys
from collections.abc import Callable
from typing import Any, overload

import torch
from torch import Tensor

from neural_layers.kernels.arguments import accumulation_dtype

# Options of every launch. The fusion of multiplications with additions is named because Triton warns where it is left
# to its default, which changes with 3.10.
LAUNCH = {"enable_fp_fusion": True}

# What `multiprocessors` answers where there is no GPU: for meta tensors, with which the host functions are compiled
# ahead of time, that of an H100 or H200; for the interpreter a few, so that loops over several blocks are tested.
_COMPILED_FOR, _INTERPRETED_ON = 132, 2


def _find() -> bool:
    try:
        spec = importlib.util.find_spec("triton")
    except ImportError:
        return False
    # A folder of that name on the path is found as a namespace, which has no origin.
    return spec is not None and spec.origin is not None


INSTALLED = _find()


def interpreting() -> bool:
    """Whether kernels run in Triton's interpreter, which TRITON_INTERPRET=1 turns on before triton is imported."""
    if "triton.language" in sys.modules:
        # The environment may have changed since; what Triton's own functions were made into has not.
        return type(sys.modules["triton.language"].cdiv).__name__ == "InterpretedFunction"
    return os.environ.get("TRITON_INTERPRET", "").lower() in ("1", "true", "on", "yes", "y")


def obstacle(*args: Any, **kwargs: Any) -> str | None:
    """The reason in words why Triton cannot run on the tensors among these arguments of an op, or None."""
    if not INSTALLED:
        return "triton is not installed; pip install 'neural-layers[triton]'"
    devices = [value.device for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    interpreted = interpreting()
    for device in devices:
        if device != devices[0]:
            return f"the tensors lie on {devices[0]} and on {device}"
        if device.type == "cpu" and not interpreted:
            return (
                "the tensors are on the CPU, and Triton's interpreter is off; TRITON_INTERPRET=1 before triton is "
                "imported turns it on, for tests"
            )
        if device.type not in ("cpu", "cuda"):
            return f"Triton kernels run on CUDA and ROCm devices, not on {device.type}"
        # torch.compile cannot ask for the capability; Triton itself refuses such a GPU then.
        if device.type == "cuda" and not interpreted and not torch.compiler.is_compiling() and _is_old(device):
            return "the GPU's compute capability is below 8.0, which the kernels are compiled for"
    return None


def avoid(*args: Any, **kwargs: Any) -> str | None:
    """The reason why `backend="auto"` passes Triton over although it could run, or None."""
    return "runs in Triton's interpreter, which is for tests" if interpreting() else None


def deferred(module: str, function: str) -> Callable[..., Any]:
    """A function of `neural_layers.kernels.<module>`, which is imported, and triton with it, at the first call."""

    def call(*args: Any) -> Any:
        return getattr(importlib.import_module(f"neural_layers.kernels.{module}"), function)(*args)

    return call


def accumulator(*tensors: Tensor | None) -> Any:
    """The Triton dtype in which kernels compute: `tl.float64` where a tensor is float64, otherwise `tl.float32`."""
    import triton.language as tl

    return tl.float64 if accumulation_dtype(*tensors) == torch.float64 else tl.float32


def on_device(tensor: Tensor) -> torch.cuda.device_of:
    """The context in which to launch kernels on `tensor`: Triton launches on the current device."""
    return torch.cuda.device_of(tensor)


def strides(tensor: Tensor | None, dimensions: int) -> tuple[int, ...]:
    """The first strides of an argument, zeros where it is absent."""
    return (0,) * dimensions if tensor is None else tensor.stride()[:dimensions]


@overload
def rows(x: Tensor) -> Tensor: ...
@overload
def rows(x: Tensor | None) -> Tensor | None: ...
def rows(x: Tensor | None) -> Tensor | None:
    """x with neighbouring elements in its last dimension, copied only where its strides leave no other way."""
    return x if x is None or x.stride(-1) == 1 else x.contiguous()


def contiguous(*tensors: Tensor | None) -> tuple[Tensor | None, ...]:
    """The arguments that are there, each in order."""
    return tuple(tensor if tensor is None else tensor.contiguous() for tensor in tensors)


def multiprocessors(device: torch.device) -> int:
    """The number of streaming multiprocessors (compute units) of a device: of how many programs a persistent kernel
    is made, so that each keeps its partial sums to its end."""
    if device.type == "cuda":
        return torch.cuda.get_device_properties(device).multi_processor_count
    return _COMPILED_FOR if device.type == "meta" else _INTERPRETED_ON


def _is_old(device: torch.device) -> bool:
    return torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0)
