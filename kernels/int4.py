"""The record of a weight in 4 bits with a scale and a zero point for each group of inputs.

Laid out as ONNX Runtime's MatMulNBits reads it: each row of the weight is cut into groups of `block_size` inputs, of
which the last may be shorter and is then filled up with codes of zero. A byte holds two, the first in its low half.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.utils._pytree as pytree
from torch import Tensor

BLOCK_SIZES = (16, 32, 64, 128, 256)
LARGEST = 15
# Groups of smaller numbers count as zero: the reciprocal of their scale would overflow.
TINY = 2.0**-120


@dataclass(frozen=True, eq=False)
class QuantizedInt4:
    """w_oi = scale_og · (code_oi − zero_point_og) for the group g of i: what `quantize_int4` returns.

    packed:       uint8 (out, groups · block_size / 2): two codes a byte, the first in the low half
    scale:        float32 (out, groups)
    zero_point:   uint8 (out, groups), a code 0 … 15
    block_size:   inputs in a group: 16, 32, 64, 128 or 256
    shape, dtype: of the weight that was quantized, (out, in)

    A pytree node: through `torch.compile` and `torch.export` its tensors pass as inputs, the rest as constants.
    """

    packed: Tensor
    scale: Tensor
    zero_point: Tensor
    block_size: int
    shape: tuple[int, int]
    dtype: torch.dtype

    def to(self, device: torch.device | str) -> "QuantizedInt4":
        """The same bits on another device."""
        children, constants = _flatten(self)
        return _unflatten([tensor.to(device) for tensor in children], constants)


_TENSORS = ("packed", "scale", "zero_point")
_Constants = tuple[int, tuple[int, int], torch.dtype]


def _flatten(quantized: QuantizedInt4) -> tuple[list[Any], _Constants]:
    return [getattr(quantized, name) for name in _TENSORS], (quantized.block_size, quantized.shape, quantized.dtype)


def _flatten_with_keys(quantized: QuantizedInt4) -> tuple[list[tuple[pytree.KeyEntry, Any]], _Constants]:
    children, constants = _flatten(quantized)
    return [(pytree.GetAttrKey(name), child) for name, child in zip(_TENSORS, children, strict=True)], constants


def _unflatten(children: Any, constants: _Constants) -> QuantizedInt4:
    packed, scale, zero_point = children
    return QuantizedInt4(packed, scale, zero_point, *constants)


def _dump(constants: _Constants) -> list[Any]:
    return [*constants[:2], str(constants[2]).removeprefix("torch.")]


def _restore(dumped: list[Any]) -> _Constants:
    block_size, (outputs, inputs), dtype = dumped
    return block_size, (outputs, inputs), getattr(torch, dtype)


pytree.register_pytree_node(
    QuantizedInt4,
    _flatten,
    _unflatten,
    serialized_type_name="neural_layers.QuantizedInt4",
    to_dumpable_context=_dump,
    from_dumpable_context=_restore,
    flatten_with_keys_fn=_flatten_with_keys,
)
# An exported program keeps its example inputs, and is loaded by the unpickler that admits known classes only.
torch.serialization.add_safe_globals([QuantizedInt4])


def check_block_size(block_size: int) -> None:
    """Raise ValueError for a block_size that there is not."""
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"block_size={block_size} must be one of {', '.join(map(str, BLOCK_SIZES))}")


def groups_of(inputs: int, block_size: int) -> int:
    """The number of groups in a row."""
    return -(-inputs // block_size)


def check_quantized(quantized: QuantizedInt4) -> None:
    """Raise TypeError or ValueError for a record whose tensors do not fit each other."""
    if not isinstance(quantized, QuantizedInt4):
        raise TypeError(
            f"quantized is a {type(quantized).__name__}; expected the QuantizedInt4 that quantize_int4 returns"
        )
    check_block_size(quantized.block_size)
    outputs, inputs = quantized.shape
    groups = groups_of(inputs, quantized.block_size)
    expected: dict[str, tuple[torch.dtype, tuple[int, int]]] = {
        "packed": (torch.uint8, (outputs, groups * quantized.block_size // 2)),
        "scale": (torch.float32, (outputs, groups)),
        "zero_point": (torch.uint8, (outputs, groups)),
    }
    for name, (dtype, shape) in expected.items():
        tensor = getattr(quantized, name)
        if tensor.dtype != dtype:
            raise TypeError(f"{name} has dtype {tensor.dtype}; expected {dtype}")
        if tensor.shape != shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; expected {shape} for a weight of shape {quantized.shape} "
                f"in groups of {quantized.block_size}"
            )
        if tensor.device != quantized.packed.device:
            raise ValueError(f"{name} lies on {tensor.device}, packed on {quantized.packed.device}")
