"""8-bit weights, and activations that are rounded to 8 bits: at the sizes of a small model's layers and of its head."""

import torch
import torch.nn.functional as tf
from torch import Tensor

from neural_layers.benchmarks.case import Call, Case, Inputs, Maker, Peer, Size, sweep
from neural_layers.benchmarks.limits import bytes_of, copy_limit
from neural_layers.kernels.int8 import dequantize_rows, quantize_rows


def make(size: Size, maker: Maker) -> Inputs:
    """x (rows, inputs), and weight and scale of a layer (outputs, inputs)."""
    drawn = maker.normal(size["outputs"], size["inputs"], dtype=torch.float32) / size["inputs"] ** 0.5
    weight, scale = quantize_rows(drawn)
    return {"x": maker.normal(size["rows"], size["inputs"]), "weight": weight, "scale": scale}


def make_static(size: Size, maker: Maker) -> Inputs:
    """The same with a scale and a zero point for x."""
    device = maker.device
    scale, zero_point = torch.tensor(0.04, device=device), torch.tensor(128, dtype=torch.int32, device=device)
    return {**make(size, maker), "input_scale": scale, "input_zero_point": zero_point}


def dense(inputs: Inputs) -> Call:
    """What 8 bits are compared with."""
    x, weight = inputs["x"], dequantize_rows(inputs["weight"], inputs["scale"]).to(inputs["x"].dtype)
    return Call(lambda: tf.linear(x, weight))


def integer_product(inputs: Inputs) -> Call:
    """Rows rounded by torch, and its product of integers."""
    x, weight, scale = inputs["x"], inputs["weight"].T, inputs["scale"]

    def run() -> Tensor:
        row_scale = x.abs().amax(dim=-1, keepdim=True) / 127
        return torch._int_mm((x / row_scale).round().to(torch.int8), weight) * (row_scale * scale)

    return Call(run)


def torchao(inputs: Inputs) -> Call:
    """torchao's dynamic quantization of the same layer."""
    from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

    weight = dequantize_rows(inputs["weight"], inputs["scale"])
    layer = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device=weight.device)
    layer.weight = torch.nn.Parameter(weight, requires_grad=False)
    model = torch.nn.Sequential(layer)
    quantize_(model, Int8DynamicActivationInt8WeightConfig())
    return Call(lambda: model(inputs["x"]))


_PEERS = (
    Peer("torch, not quantized", dense, call="linear with the restored weight, in float32"),
    Peer("torch._int_mm", integer_product, call="torch._int_mm over rows that torch rounds"),
    Peer("torchao", torchao, "torchao", "pip install torchao", call="Int8DynamicActivationInt8WeightConfig, eager"),
)


def _case(name: str, about: str, inputs: int, outputs: int, peers: tuple[Peer, ...], static: bool = False) -> Case:
    return Case(
        name=name,
        op="linear_int8",
        about=about,
        axis="rows",
        make=make_static if static else make,
        leaves=(),
        tiny=sweep(rows=(1, 17), inputs=64, outputs=33),
        quick=sweep(rows=(1, 512), inputs=inputs, outputs=outputs),
        full=sweep(rows=(1, 8, 64, 512), inputs=inputs, outputs=outputs),
        peers=peers,
        limit=copy_limit(lambda i: bytes_of(i, "weight")),
        largest_difference={"cpu": 3e-2, "cuda": 3e-2},
    )


CASES = (
    _case("linear_int8", "a layer in 8 bits, 512 to 2048, each row rounded by itself", 512, 2048, _PEERS),
    _case("linear_int8_head", "a head in 8 bits, 512 to 32000", 512, 32000, _PEERS[:2]),
    _case("linear_int8_static", "a layer in 8 bits, 2048 to 512, a given scale for x", 2048, 512, _PEERS[:1], True),
)
