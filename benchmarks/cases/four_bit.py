"""4-bit weights: quantizing them, restoring them, multiplying with them."""

import logging
from typing import Any

import torch
from torch import Tensor

import neural_layers.functional as F
from neural_layers.benchmarks.case import Call, Case, Inputs, Maker, Peer, Size, sweep
from neural_layers.benchmarks.limits import copy_limit

# It warns of a kernel that it did not find, each time it is imported; what it runs here is told below the table.
logging.getLogger("bitsandbytes").setLevel(logging.ERROR)

BITSANDBYTES = "pip install 'neural-layers[bench]'"
FLOAT32 = {"cpu": torch.float32, "cuda": torch.bfloat16}
BFLOAT16 = {"cpu": torch.bfloat16, "cuda": torch.bfloat16}


def make_quantize(size: Size, maker: Maker) -> Inputs:
    """A square weight."""
    return {"weight": maker.normal(size["D"], size["D"])}


def make_dequantize(size: Size, maker: Maker) -> Inputs:
    """The record of a quantized square weight."""
    return {"quantized": F.quantize_4bit(maker.normal(size["D"], size["D"]))}


def make_linear(size: Size, maker: Maker) -> Inputs:
    """rows of activations and a quantized square weight."""
    quantized = F.quantize_4bit(maker.normal(size["D"], size["D"], dtype=torch.float32) / size["D"] ** 0.5)
    return {"x": maker.normal(size["rows"], size["D"]), "quantized": quantized}


def state_of(quantized: Any, dtype: torch.dtype) -> tuple[Tensor, Any]:
    """The same weight as bitsandbytes keeps it: packed bytes and a state. Both hold the same bits."""
    from bitsandbytes.functional import QuantState, get_4bit_type

    state = QuantState(
        absmax=quantized.absmax,
        shape=torch.Size(quantized.shape),
        code=get_4bit_type(quantized.quant_type, device=quantized.packed.device),
        blocksize=quantized.block_size,
        quant_type=quantized.quant_type,
        dtype=dtype,
    )
    return quantized.packed.reshape(-1, 1), state


def quantize(inputs: Inputs) -> Call:
    """bitsandbytes' quantization."""
    from bitsandbytes.functional import quantize_4bit

    weight = inputs["weight"]
    return Call(
        lambda: quantize_4bit(weight, blocksize=64, quant_type="nf4"), compare=lambda made: made[0].reshape(-1).float()
    )


def dequantize(inputs: Inputs) -> Call:
    """bitsandbytes' dequantization."""
    from bitsandbytes.functional import dequantize_4bit

    packed, state = state_of(inputs["quantized"], inputs["quantized"].dtype)
    return Call(lambda: dequantize_4bit(packed, state))


def linear(inputs: Inputs) -> Call:
    """bitsandbytes' product with the weight as it is stored, as in `Linear4bit` in training mode."""
    from bitsandbytes.autograd._functions import matmul_4bit

    x = inputs["x"]
    packed, state = state_of(inputs["quantized"], x.dtype)
    return Call(lambda: matmul_4bit(x, packed, state))


def linear_fused(inputs: Inputs) -> Call:
    """bitsandbytes' fused bfloat16 kernel, with the weight packed for it beforehand, as in `Linear4bit` in `eval()`."""
    import warnings

    from bitsandbytes.autograd._functions import matmul_4bit
    from bitsandbytes.functional import _convert_weight_packed_for_cpu, has_avx512bf16

    if not has_avx512bf16():
        raise RuntimeError("its fused kernel needs AVX-512 with bfloat16")
    x = inputs["x"]
    packed, state = state_of(inputs["quantized"], x.dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        packed, state = _convert_weight_packed_for_cpu(packed, state)
    return Call(lambda: matmul_4bit(x, packed, state))


def dense(inputs: Inputs) -> Call:
    """The product with the restored weight: what 4 bits are compared with."""
    x, weight = inputs["x"], F.dequantize_4bit(inputs["quantized"]).to(inputs["x"].dtype)
    return Call(lambda: torch.nn.functional.linear(x, weight))


def bytes_packed(quantized: Any) -> float:
    """Of a record: half a byte a value, and what restores them."""
    return float(quantized.packed.numel() + quantized.absmax.numel() * quantized.absmax.element_size())


_DENSE = Peer("torch, not quantized", dense, call="linear with the restored weight, in the dtype of x")
_LINEAR = Peer("bitsandbytes", linear, "bitsandbytes.functional", BITSANDBYTES, call="matmul_4bit")
_FUSED = Peer(
    "bitsandbytes fused", linear_fused, "bitsandbytes.functional", BITSANDBYTES, "cpu",
    call="matmul_4bit, the weight packed for the bfloat16 kernel that it comes with",
)  # fmt: skip


def _linear_case(name: str, about: str, dtypes: dict[str, torch.dtype], quick: tuple[int, ...]) -> Case:
    return Case(
        name=name,
        op="linear_4bit",
        about=about,
        axis="rows",
        make=make_linear,
        leaves=(),
        tiny=sweep(rows=(1, 3), D=128),
        quick=sweep(rows=quick, D=4096),
        full=sweep(rows=(1, 4, 16, 64, 256, 1024), D=4096),
        cuda=sweep(rows=(1, 16, 256, 4096), D=8192),
        dtypes=dtypes,
        peers=(_LINEAR, _FUSED, _DENSE),
        limit=copy_limit(lambda i: bytes_packed(i["quantized"])),
        largest_difference={"cpu": 3e-2, "cuda": 3e-2},
    )


_TINY, _QUICK, _FULL, _CUDA = (
    sweep(D=sides) for sides in ((64, 128), (1024, 2048), (512, 1024, 2048, 4096), (1024, 4096, 8192))
)

CASES = (
    Case(
        name="quantize_4bit",
        op="quantize_4bit",
        about="a weight D × D to NF4",
        axis="D",
        make=make_quantize,
        leaves=(),
        tiny=_TINY,
        quick=_QUICK,
        full=_FULL,
        cuda=_CUDA,
        peers=(Peer("bitsandbytes", quantize, "bitsandbytes.functional", BITSANDBYTES, call="quantize_4bit"),),
        limit=copy_limit(lambda i: i["weight"].numel() * (i["weight"].element_size() + 0.5 + 4 / 64)),
        compare=lambda made: made.packed.reshape(-1).float(),
    ),
    Case(
        name="dequantize_4bit",
        op="dequantize_4bit",
        about="NF4 to a weight D × D",
        axis="D",
        make=make_dequantize,
        leaves=(),
        tiny=_TINY,
        quick=_QUICK,
        full=_FULL,
        cuda=_CUDA,
        peers=(Peer("bitsandbytes", dequantize, "bitsandbytes.functional", BITSANDBYTES, call="dequantize_4bit"),),
        limit=copy_limit(lambda i: bytes_packed(i["quantized"]) * (1 + i["quantized"].dtype.itemsize / (0.5 + 4 / 64))),
    ),
    _linear_case("linear_4bit", "rows × D times a weight D × D in NF4, float32 activations", FLOAT32,
                 quick=(1, 16, 256)),
    _linear_case("linear_4bit_bfloat16", "rows × D times a weight D × D in NF4, bfloat16 activations", BFLOAT16,
                 quick=(1, 16, 256)),
)  # fmt: skip
