"""4-bit quantization in C (backend `native`): native.c."""

import torch
from torch import Tensor

from neural_layers.kernels import c_library
from neural_layers.kernels.four_bit import ASCENDING, Quantized4bit, midpoints
from neural_layers.kernels.quantize_4bit.pytorch import as_record

_BORDERS = {quant_type: midpoints(quant_type) for quant_type in ASCENDING}
_ASCENDING = {name: torch.tensor(codes, dtype=torch.uint8, device="cpu") for name, codes in ASCENDING.items()}


def quantize_4bit_native(
    weight: Tensor, quant_type: str = "nf4", block_size: int = 64, double_quant: bool = False
) -> Quantized4bit:
    """absmax_b = max |w| over block b;  code_i = the nearest of the 16 codes to w_i / absmax_b."""
    weight = weight.detach()
    run = _quantize if c_library.unwatched(weight) else _quantize_op
    packed, absmax = run(weight, quant_type, block_size)
    return as_record(weight, packed, absmax, quant_type, block_size, double_quant)


def _quantize(weight: Tensor, quant_type: str, block_size: int) -> tuple[Tensor, Tensor]:
    """packed (bytes, 1) uint8 and absmax (blocks,) float32."""
    weight = (weight.float() if weight.dtype == torch.float64 else weight).contiguous()
    packed, absmax = _empty(weight, block_size)
    run = c_library.function("quantize_4bit", torch.float32)
    code, tables = c_library.code(weight, torch.float32), (_BORDERS[quant_type], _ASCENDING[quant_type])
    run(weight, code, *tables, packed, absmax, weight.numel(), block_size, torch.get_num_threads())
    return packed, absmax


def _empty(weight: Tensor, block_size: int) -> tuple[Tensor, Tensor]:
    count = weight.numel()
    packed = weight.new_empty(((count + 1) // 2, 1), dtype=torch.uint8)
    return packed, weight.new_empty((count + block_size - 1) // block_size, dtype=torch.float32)


@torch.library.custom_op("neural_layers::quantize_4bit", mutates_args=())
def _quantize_op(weight: Tensor, quant_type: str, block_size: int) -> tuple[Tensor, Tensor]:
    """What torch sees of `_quantize`, where a graph is traced."""
    return _quantize(weight, quant_type, block_size)


@_quantize_op.register_fake
def _(weight: Tensor, quant_type: str, block_size: int) -> tuple[Tensor, Tensor]:
    return _empty(weight, block_size)
