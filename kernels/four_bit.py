"""The 4-bit codes and the record of a quantized weight (arXiv 2305.14314), laid out as bitsandbytes does.

A weight is flattened row-major and cut into blocks of `block_size` elements, the last of which may be shorter. Of each
block the largest magnitude is kept (`absmax`), and of each element the nearest of 16 codes times that; a byte holds two
codes, the even element's in its high half. With double quantization the `absmax` are quantized in turn: their mean
(`offset`) is subtracted and the rest kept in blocks of 256 as 8-bit codes with one `nested_absmax` each.
"""

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from torch import Tensor

_FP4 = tuple(value / 12 for value in (0.0, 0.0625, 8.0, 12.0, 4.0, 6.0, 2.0, 3.0))
# The values of the codes 0 … 15. NF4: quantiles of a normal distribution. FP4: sign, 2 bits of exponent, 1 of mantissa.
CODES: dict[str, tuple[float, ...]] = {
    "nf4": (
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ),
    "fp4": (*_FP4, *(-value for value in _FP4)),
}
# The codes in ascending order of their values; of the two zeros of FP4, the positive one comes first.
ASCENDING: dict[str, tuple[int, ...]] = {
    "nf4": tuple(range(16)),
    "fp4": (11, 10, 13, 12, 15, 14, 9, 0, 8, 1, 6, 7, 4, 5, 2, 3),
}
BLOCK_SIZES = (32, 64, 128, 256, 512, 1024, 2048, 4096)
NESTED_BLOCK = 256
# Divided by in place of a smaller absmax. Not a normal number, but its reciprocal is.
TINY = 1e-38


def _dynamic_map() -> tuple[float, ...]:
    """The values of the signed 8-bit dynamic codes (arXiv 1511.04561): 2^i fractions in the decade up to 10^(i − 6)."""
    positive: list[float] = []
    for i in range(7):
        edges = torch.linspace(0.1, 1, 2**i + 1, dtype=torch.float32, device="cpu")
        positive += (10.0 ** (i - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
    return tuple(sorted([*positive, *(-value for value in positive), 0.0, 1.0]))


DYNAMIC_MAP = _dynamic_map()


@dataclass(frozen=True, eq=False)
class Quantized4bit:
    """A weight in 4 bits: what `quantize_4bit` returns and `dequantize_4bit` and `linear_4bit` take.

    packed:        uint8 (bytes, 1): two codes a byte, the even element's in the high half
    absmax:        (blocks,) float32, the largest magnitude of each block; uint8 codes of it where double-quantized
    quant_type:    "nf4" or "fp4"
    block_size:    elements in a block
    shape, dtype:  of the weight that was quantized
    offset:        where double-quantized, float32 (): the mean of the absmax; otherwise None
    nested_absmax: where double-quantized, float32 (blocks / 256, rounded up); otherwise None

    A pytree node: through `torch.compile` and `torch.export` its tensors pass as inputs, the rest as constants.
    """

    packed: Tensor
    absmax: Tensor
    quant_type: str
    block_size: int
    shape: tuple[int, ...]
    dtype: torch.dtype
    offset: Tensor | None = None
    nested_absmax: Tensor | None = None

    @property
    def numel(self) -> int:
        """The number of weights."""
        count = 1
        for size in self.shape:
            count *= size
        return count

    def to(self, device: torch.device | str) -> "Quantized4bit":
        """The same bits on another device."""
        children, constants = _flatten(self)
        return _unflatten([None if tensor is None else tensor.to(device) for tensor in children], constants)


_TENSORS = ("packed", "absmax", "offset", "nested_absmax")
_Constants = tuple[str, int, tuple[int, ...], torch.dtype]


def _flatten(quantized: Quantized4bit) -> tuple[list[Any], _Constants]:
    constants = (quantized.quant_type, quantized.block_size, quantized.shape, quantized.dtype)
    return [getattr(quantized, name) for name in _TENSORS], constants


def _flatten_with_keys(quantized: Quantized4bit) -> tuple[list[tuple[pytree.KeyEntry, Any]], _Constants]:
    children, constants = _flatten(quantized)
    return [(pytree.GetAttrKey(name), child) for name, child in zip(_TENSORS, children, strict=True)], constants


def _unflatten(children: Any, constants: _Constants) -> Quantized4bit:
    packed, absmax, offset, nested_absmax = children
    return Quantized4bit(packed, absmax, *constants, offset, nested_absmax)


def _dump(constants: _Constants) -> list[Any]:
    return [*constants[:3], str(constants[3]).removeprefix("torch.")]


def _restore(dumped: list[Any]) -> _Constants:
    quant_type, block_size, shape, dtype = dumped
    return quant_type, block_size, tuple(shape), getattr(torch, dtype)


pytree.register_pytree_node(
    Quantized4bit,
    _flatten,
    _unflatten,
    serialized_type_name="neural_layers.Quantized4bit",
    to_dumpable_context=_dump,
    from_dumpable_context=_restore,
    flatten_with_keys_fn=_flatten_with_keys,
)
# An exported program keeps its example inputs, and is loaded by the unpickler that admits known classes only.
torch.serialization.add_safe_globals([Quantized4bit])


def check_format(quant_type: str, block_size: int) -> None:
    """Raise ValueError for a quant_type or block_size that there is not."""
    if quant_type not in CODES:
        raise ValueError(f"quant_type={quant_type!r} must be 'nf4' or 'fp4'")
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"block_size={block_size} must be one of {', '.join(map(str, BLOCK_SIZES))}")


def check_quantized(quantized: Quantized4bit) -> None:
    """Raise TypeError or ValueError for a record whose tensors do not fit its shape and block_size."""
    if not isinstance(quantized, Quantized4bit):
        raise TypeError(
            f"quantized is a {type(quantized).__name__}; expected the Quantized4bit that quantize_4bit returns"
        )
    check_format(quantized.quant_type, quantized.block_size)
    blocks = -(-quantized.numel // quantized.block_size)
    nested = quantized.nested_absmax is not None
    if nested != (quantized.offset is not None):
        raise ValueError("offset and nested_absmax must be given together, or both be None")
    expected: dict[str, tuple[torch.dtype, tuple[int, ...]]] = {
        "packed": (torch.uint8, ((quantized.numel + 1) // 2, 1)),
        "absmax": (torch.uint8 if nested else torch.float32, (blocks,)),
    }
    if nested:
        expected |= {"offset": (torch.float32, ()), "nested_absmax": (torch.float32, (-(-blocks // NESTED_BLOCK),))}
    for name, (dtype, shape) in expected.items():
        tensor = getattr(quantized, name)
        if tensor.dtype != dtype:
            raise TypeError(f"{name} has dtype {tensor.dtype}; expected {dtype}")
        if tensor.shape != shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}; expected {shape} for a weight of shape {quantized.shape} "
                f"in blocks of {quantized.block_size}"
            )
        if tensor.device != quantized.packed.device:
            raise ValueError(f"{name} lies on {tensor.device}, packed on {quantized.packed.device}")


def midpoints(quant_type: str) -> Tensor:
    """The 15 borders between neighbouring codes, float32 on the CPU: a value on a border belongs to the lower code."""
    values = torch.tensor(
        [CODES[quant_type][code] for code in ASCENDING[quant_type]], dtype=torch.float32, device="cpu"
    )
    return (values[:-1] + values[1:]) / 2


def encode_absmax(absmax: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Double quantization: the uint8 codes of the absmax, the nested_absmax and the offset.

    A value is first put on a grid of 65536 steps between −1 and 1, then to the code nearest to that: so does
    bitsandbytes on the CPU, with the same bits.
    """
    offset = absmax.mean()
    centred = F.pad(absmax - offset, (0, -absmax.numel() % NESTED_BLOCK)).view(-1, NESTED_BLOCK)
    nested_absmax = centred.abs().amax(dim=1)
    scaled = (centred * (1 / nested_absmax)[:, None]).clamp(-1, 1)
    # Rounded once, as a fused multiply-add does: float64 holds the product exactly.
    step = (((1 + scaled) * 0.5).double() * 65535 + 0.5).float().int()
    grid = 2 * step.float() / 65535 - 1
    values = torch.tensor(DYNAMIC_MAP, dtype=torch.float32, device=absmax.device)
    codes = torch.bucketize(grid, (values[:-1] + values[1:]) * 0.5, out_int32=True).to(torch.uint8)
    codes = codes * (nested_absmax > 0)[:, None]
    return codes.view(-1)[: absmax.numel()].contiguous(), nested_absmax, offset


def decode_absmax(quantized: Quantized4bit) -> Tensor:
    """The absmax (blocks,) in float32, decoded where they are double-quantized."""
    if quantized.offset is None or quantized.nested_absmax is None:
        return quantized.absmax
    values = torch.tensor(DYNAMIC_MAP, dtype=torch.float32, device=quantized.absmax.device)
    scales = quantized.nested_absmax.repeat_interleave(NESTED_BLOCK)[: quantized.absmax.shape[0]]
    return values[quantized.absmax.int()] * scales + quantized.offset
