"""4-bit dequantization in C (backend `native`): native.c."""

import torch
from torch import Tensor

from neural_layers.kernels import c_library
from neural_layers.kernels.four_bit import CODES, DYNAMIC_MAP, Quantized4bit

_VALUES = {name: torch.tensor(values, dtype=torch.float32, device="cpu") for name, values in CODES.items()}
_MAP = torch.tensor(DYNAMIC_MAP, dtype=torch.float32, device="cpu")


def dequantize(quantized: Quantized4bit) -> Tensor:
    """The weight, computed now."""
    weight = quantized.packed.new_empty(quantized.shape, dtype=quantized.dtype)
    arithmetic = torch.float64 if quantized.dtype == torch.float64 else torch.float32
    run = c_library.function("dequantize_4bit", arithmetic)
    code = c_library.code(weight, arithmetic)
    run(*weight_arguments(quantized), weight.numel(), weight, code, torch.get_num_threads())
    return weight


def weight_arguments(quantized: Quantized4bit) -> tuple[Tensor | int | None, ...]:
    """The record as the C kernels take it: packed, absmax, values, map, nested, offset, block."""
    values = _VALUES[quantized.quant_type]
    tensors = (quantized.packed, quantized.absmax, quantized.nested_absmax, quantized.offset)
    packed, absmax, nested, offset = (None if tensor is None else tensor.contiguous() for tensor in tensors)
    return packed, absmax, values, _MAP, nested, offset, quantized.block_size
