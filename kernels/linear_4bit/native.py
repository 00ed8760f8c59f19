"""The 4-bit linear layer in C: native.c, native_bfloat16.c (backend `native`) and native_int8.c (`native_int8`)."""

from dataclasses import replace
from struct import Struct

import torch
from torch import Tensor

from neural_layers.kernels import c_library
from neural_layers.kernels.arguments import accumulation_dtype
from neural_layers.kernels.dequantize_4bit.native import dequantize, weight_arguments
from neural_layers.kernels.four_bit import CODES, Quantized4bit
from neural_layers.kernels.prepared import Prepared, is_preparable

# The bits of _FEATURES, and the codes that the kernels for wide vectors take at once: see groups.h.
_BFLOAT16, _INT8 = 1, 2
_GROUP = 128


def _features() -> int:
    found = torch.zeros(1, dtype=torch.int64, device="cpu")
    if c_library.VARIANT:
        c_library.function("linear_4bit_features", torch.float32)(found)
    return int(found)


# What this processor multiplies in 64-byte vectors beside floats.
_FEATURES = _features()


def product(x: Tensor, quantized: Quantized4bit, bias: Tensor | None, transposed: bool) -> Tensor:
    """x Wᵀ + bias, or x W where transposed, then through a dequantized copy of W that lives for the call."""
    if transposed:
        with torch.autocast("cpu", enabled=False):
            return x @ dequantize(replace(quantized, dtype=x.dtype))
    inputs, dtype = quantized.shape[1], accumulation_dtype(x)
    in_groups = inputs % _GROUP == 0 and quantized.block_size >= _GROUP // 2
    if x.dtype == torch.bfloat16 and in_groups and _FEATURES & _BFLOAT16:
        return _run("linear_4bit_bfloat16", (), x, quantized, bias)
    return _run("linear_4bit", (c_library.code(x, dtype),), x, quantized, bias)


def product_int8(x: Tensor, quantized: Quantized4bit, bias: Tensor | None, transposed: bool) -> Tensor:
    """x Wᵀ + bias with x and the codes in 8 bits. Where transposed, which is for gradients, nothing is rounded."""
    if transposed:
        return product(x, quantized, bias, transposed)
    codes = (*_BYTES[quantized.quant_type], c_library.code(x, torch.float32))
    return _run("linear_4bit_int8", codes, x, quantized, bias)


# The struct Call of native.c after its head.
_constants = Struct("7P3q").pack


def prepare(quantized: Quantized4bit, bias: Tensor | None) -> Prepared | None:
    """`product` in float32 for a weight and a bias that were checked, or None where their dtypes or their place need a
    copy in every call."""
    outputs, inputs = quantized.shape
    tensors = (quantized.packed, quantized.absmax, quantized.offset, quantized.nested_absmax, bias)
    if not is_preparable(*tensors) or (bias is not None and bias.dtype != torch.float32):
        return None
    *record, block = weight_arguments(quantized)
    pointers = [tensor.data_ptr() if isinstance(tensor, Tensor) else 0 for tensor in (*record, bias)]
    constants = _constants(*pointers, block, inputs, outputs)
    return Prepared("linear_4bit_prepared", tensors, constants, (inputs, outputs), {torch.float32: 0})


def int8_obstacle(x: Tensor, quantized: Quantized4bit) -> str | None:
    """Why `product_int8` cannot run, or None."""
    if x.dtype == torch.float64:
        return "it does not compute in float64"
    if quantized.shape[1] % max(_GROUP, quantized.block_size) or quantized.block_size < _GROUP // 2:
        return "it takes blocks of 64 or more, and a number of inputs that is a multiple of 128 and of the block size"
    if not _FEATURES & _INT8:
        return "it needs a processor with AVX-512 VNNI and VBMI, and the variant avx512"
    return None


def _run(
    name: str, options: tuple[Tensor | float, ...], x: Tensor, quantized: Quantized4bit, bias: Tensor | None
) -> Tensor:
    outputs, inputs = quantized.shape
    dtype = accumulation_dtype(x)
    x = x.contiguous()
    y = x.new_empty(*x.shape[:-1], outputs)
    if bias is not None:
        bias = bias.to(dtype).contiguous()
    sizes = (y.numel() // max(outputs, 1), inputs, outputs)
    run = c_library.function(name, dtype)
    run(*weight_arguments(quantized), *options, x, bias, y, *sizes, torch.get_num_threads())
    return y


def _bytes(quant_type: str, scale: float, shift: float) -> tuple[Tensor, float, float]:
    """The codes as unsigned bytes, and the step and zero with which value ≈ step · (byte + zero), by least squares."""
    values = CODES[quant_type]
    rounded = [float(round(value * scale + shift)) for value in values]
    mean_value, mean_byte, least = sum(values) / 16, sum(rounded) / 16, min(rounded)
    covariance = sum((r - mean_byte) * (v - mean_value) for r, v in zip(rounded, values, strict=True))
    step = covariance / sum((r - mean_byte) ** 2 for r in rounded)
    codes = torch.tensor([int(r - least) for r in rounded], dtype=torch.uint8, device="cpu")
    return codes, step, mean_value / step - mean_byte + least


# Of all scales, these leave the least error: 0.25 and 0.23 % of the codes' root mean square.
_BYTES = {"nf4": _bytes("nf4", 123.65, 0.11), "fp4": _bytes("fp4", 119.6, 0.0)}
