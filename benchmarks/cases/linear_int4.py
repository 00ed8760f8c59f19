"""Affine 4-bit weights: quantizing, restoring, multiplying."""

import torch
import torch.nn.functional as tf

import neural_layers.functional as F
from neural_layers.benchmarks.case import Call, Case, Inputs, Maker, Peer, Size, sweep
from neural_layers.benchmarks.limits import copy_limit
from neural_layers.kernels.int4 import QuantizedInt4

_BLOCK = 64


def make_weight(size: Size, maker: Maker) -> Inputs:
    """A square weight."""
    return {"weight": maker.normal(size["D"], size["D"])}


def make_record(size: Size, maker: Maker) -> Inputs:
    """The record of a quantized square weight."""
    return {"quantized": F.quantize_int4(maker.normal(size["D"], size["D"]))}


def make_linear(size: Size, maker: Maker) -> Inputs:
    """x (rows, inputs) and the record of a weight (outputs, inputs)."""
    drawn = maker.normal(size["outputs"], size["inputs"], dtype=torch.float32) / size["inputs"] ** 0.5
    return {"x": maker.normal(size["rows"], size["inputs"]), "quantized": F.quantize_int4(drawn, _BLOCK)}


def dense(inputs: Inputs) -> Call:
    """What 4 bits are compared with."""
    x, weight = inputs["x"], F.dequantize_int4(inputs["quantized"]).to(inputs["x"].dtype)
    return Call(lambda: tf.linear(x, weight))


def packed_bfloat16(inputs: Inputs) -> Call:
    """torch's own 4-bit product, on x in bfloat16: in float32 it takes seconds."""
    quantized, x = inputs["quantized"], inputs["x"].bfloat16()
    outputs, columns = quantized.shape
    codes = torch.stack([quantized.packed & 15, quantized.packed >> 4], dim=2).view(outputs, -1)[:, :columns]
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.int(), 1)
    # It computes (code − 8) · scale + zero.
    zeros = (8 - quantized.zero_point.float()) * quantized.scale
    scales = torch.stack([quantized.scale, zeros], dim=2).transpose(0, 1).contiguous().bfloat16()
    return Call(lambda: torch.ops.aten._weight_int4pack_mm_for_cpu(x, packed, _BLOCK, scales))


def bytes_packed(quantized: QuantizedInt4) -> float:
    """Of a record: half a byte a value, and what restores them."""
    return float(quantized.packed.numel() + 5 * quantized.scale.numel())


_DENSE = Peer("torch, not quantized", dense, call="linear with the restored weight, in float32")
_PACKED = Peer(
    "torch int4pack", packed_bfloat16, device="cpu", call="aten._weight_int4pack_mm_for_cpu, activations in bfloat16"
)


def _linear_case(name: str, about: str, inputs: int, outputs: int) -> Case:
    return Case(
        name=name,
        op="linear_int4",
        about=about,
        axis="rows",
        make=make_linear,
        leaves=(),
        tiny=sweep(rows=(1, 17), inputs=128, outputs=32),
        quick=sweep(rows=(1, 4), inputs=inputs, outputs=outputs),
        full=sweep(rows=(1, 4, 16, 256), inputs=inputs, outputs=outputs),
        peers=(_DENSE, _PACKED),
        limit=copy_limit(lambda i: bytes_packed(i["quantized"])),
        largest_difference={"cpu": 3e-2, "cuda": 3e-2},
    )


_TINY, _QUICK, _FULL = (sweep(D=sides) for sides in ((64, 128), (512, 1024), (512, 1024, 2048)))

CASES = (
    _linear_case("linear_int4", "a layer in 4 bits, 2048 to 512, float32 activations", 2048, 512),
    _linear_case("linear_int4_head", "a head in 4 bits, 512 to 32000, float32 activations", 512, 32000),
    Case(
        name="quantize_int4",
        op="quantize_int4",
        about="a weight D × D to 4 bits with a scale and a zero point for each 64 inputs",
        axis="D",
        make=make_weight,
        leaves=(),
        tiny=_TINY,
        quick=_QUICK,
        full=_FULL,
        peers=(),
        limit=copy_limit(lambda i: i["weight"].numel() * (i["weight"].element_size() + 0.5 + 5 / _BLOCK)),
        compare=lambda made: made.packed.reshape(-1).float(),
    ),
    Case(
        name="dequantize_int4",
        op="dequantize_int4",
        about="4 bits to a weight D × D",
        axis="D",
        make=make_record,
        leaves=(),
        tiny=_TINY,
        quick=_QUICK,
        full=_FULL,
        peers=(),
        limit=copy_limit(lambda i: bytes_packed(i["quantized"]) + 4 * i["quantized"].packed.numel() * 2),
    ),
)
