"""Triton's interpreter with bfloat16 made right, or refused.

The interpreter keeps bfloat16 as the uint16 of its bits and computes on them as on integers, silently wrong, and
truncates where a GPU rounds to the nearest. `repair()` gives loads, stores and casts their meaning, and refuses
arithmetic on bfloat16: our kernels cast right after a load, which is faster on a GPU too. Matrix products are the
exception, since a GPU multiplies bfloat16 matrices: their factors are widened, exactly, and accumulated in float32.

It also gives a comparison the type of what was compared, so that a mask made of a scalar comparison and a block cannot
be used; `repair()` makes it a boolean.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

ARITHMETIC = ("binary_op", "ternary_op", "unary_op", "create_fma")


class Bfloat16Arithmetic(TypeError):
    """A kernel computes on bfloat16."""


def widen(bits: np.ndarray) -> np.ndarray:
    """The float32 values of bfloat16 bits."""
    return (np.ascontiguousarray(bits).astype(np.uint32) << 16).view(np.float32)


def narrow(values: np.ndarray) -> np.ndarray:
    """The bfloat16 bits nearest to float32 values, ties to even; every NaN becomes the quiet one."""
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded.astype(np.uint16)).reshape(np.shape(values))


def is_bfloat16(handle: Any) -> bool:
    return isinstance(handle, interpreter.TensorHandle) and handle.dtype.scalar == tl.bfloat16


def repair() -> None:
    """Patch Triton's interpreter, once for the process."""
    builder = interpreter.InterpreterBuilder
    if hasattr(builder, "repaired"):
        return
    builder.repaired = True
    _repair_casts(builder)
    _repair_comparisons(builder)
    for name in ARITHMETIC:
        setattr(builder, name, _refusing(getattr(builder, name)))
    builder.create_dot = _widening(builder.create_dot)
    _repair_reductions(interpreter.ReduceScanOpInterface)


def _repair_casts(builder: type) -> None:
    cast, round_to = builder.cast_impl, builder.create_fp_to_fp

    def cast_impl(self: Any, source: Any, target: Any) -> Any:
        if is_bfloat16(source) and target.scalar != tl.bfloat16:
            source = interpreter.TensorHandle(widen(source.data), tl.float32)
            return source if target.scalar == tl.float32 else cast(self, source, target)
        if target.scalar == tl.bfloat16 and not is_bfloat16(source):
            values = source.data.astype(np.float32)
            return interpreter.TensorHandle(narrow(values), tl.bfloat16)
        return cast(self, source, target)

    def create_fp_to_fp(self: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
        if is_bfloat16(source) or target.scalar == tl.bfloat16:
            return cast_impl(self, source, target)
        return round_to(self, source, target, rounding_mode)

    builder.cast_impl, builder.create_fp_to_fp = cast_impl, create_fp_to_fp


def _repair_comparisons(builder: type) -> None:
    operation = builder.binary_op

    def binary_op(self: Any, left: Any, right: Any, function: Callable[..., Any]) -> Any:
        result = operation(self, left, right, function)
        if result.data.dtype == np.bool_:
            result.dtype = tl.int1
        return result

    builder.binary_op = binary_op


def _refusing(operation: Callable[..., Any]) -> Callable[..., Any]:
    def refuse(self: Any, *operands: Any) -> Any:
        # A choice between two (`tl.where`) computes nothing.
        if operands[-1] is not np.where and any(map(is_bfloat16, operands)):
            raise Bfloat16Arithmetic("arithmetic on bfloat16 in a kernel; cast to float32 right after tl.load")
        return operation(self, *operands)

    return refuse


def _widening(dot: Callable[..., Any]) -> Callable[..., Any]:
    def create_dot(self: Any, a: Any, b: Any, total: Any, *options: Any) -> Any:
        if is_bfloat16(total):
            raise Bfloat16Arithmetic("tl.dot accumulates in bfloat16; give it a float32 accumulator")
        wide = [interpreter.TensorHandle(widen(h.data), tl.float32) if is_bfloat16(h) else h for h in (a, b)]
        return dot(self, *wide, total, *options)

    return create_dot


def _repair_reductions(interface: type) -> None:
    apply = interface.apply

    def refuse(self: Any, values: Any) -> Any:
        if any(value.dtype.scalar == tl.bfloat16 for value in (values if isinstance(values, tuple) else (values,))):
            raise Bfloat16Arithmetic("a reduction over bfloat16 in a kernel; cast to float32 right after tl.load")
        return apply(self, values)

    interface.apply = refuse
