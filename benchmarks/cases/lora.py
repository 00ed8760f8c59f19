"""Linear layers and a model with adapters, forward and backward, beside the plain ones and PEFT's."""

from typing import Any

import torch
from torch import Tensor, nn

from neural_layers.benchmarks.case import Call, Case, Inputs, Maker, Peer, Size, leaf, sweep

_INSTALL = "pip install peft"
_FEED_FORWARD = {"D": 768, "F": 2048, "r": 8}


class FeedForward(nn.Module):
    """x + down(silu(gate(x)) · up(x)), of torch's linear layers."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(size["D"], size["F"], bias=False) for _ in range(2))
        self.down = nn.Linear(size["F"], size["D"], bias=False)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return x_BTD + self.down(nn.functional.silu(self.gate(x_BTD)) * self.up(x_BTD))


def make(size: Size, maker: Maker) -> Inputs:
    """x (1, T, D), and the weights of the layers and of their adapters."""
    draw = {"gate": (size["F"], size["D"]), "up": (size["F"], size["D"]), "down": (size["D"], size["F"])}
    weights = {name: maker.normal(*shape) * shape[1] ** -0.5 for name, shape in draw.items()}
    adapters = {
        name: (maker.normal(size["r"], inputs) * inputs**-0.5, maker.normal(outputs, size["r"]) * 0.1)
        for name, (outputs, inputs) in draw.items()
    }
    return {"x": maker.normal(1, size["T"], size["D"]), "weights": weights, "adapters": adapters, "size": dict(size)}


def plain_block(inputs: Inputs) -> FeedForward:
    """The layers, frozen."""
    block = FeedForward(inputs["size"]).to(inputs["x"].device, inputs["x"].dtype)
    for name, weight in inputs["weights"].items():
        getattr(block, name).weight.data = weight
    return block.requires_grad_(False)


def _call(block: nn.Module, inputs: Inputs, **more: Any) -> Call:
    x = leaf(inputs["x"])
    trained = tuple(p for p in block.parameters() if p.requires_grad)
    return Call(lambda: block(x), (x, *trained), **more)


def _ones(output: Tensor) -> Tensor:
    return torch.ones_like(output)


# With and without adapters, in 32 and in 4 bits, is not the same function: there, time and memory alone are compared.
_COST = {"compare": _ones}


def adapted_block(inputs: Inputs, *, dora: bool = False, quantized: bool = False) -> nn.Module:
    """The layers with `apply_lora` on each."""
    from neural_layers.wrappers import LoRAConfig, apply_lora, quantize

    block = plain_block(inputs)
    if quantized:
        quantize(block, "nf4", double_quant=True)
    apply_lora(block, LoRAConfig(r=inputs["size"]["r"], alpha=16, target_modules="all-linear", use_dora=dora))
    for name, (a, b) in inputs["adapters"].items():
        adapter: Any = getattr(block, name).adapters["default"]
        adapter.lora_A.data, adapter.lora_B.data = a, b
    return block


def peft_block(inputs: Inputs, *, dora: bool = False) -> Call:
    """PEFT's layers on the same block, with the same numbers."""
    from peft import LoraConfig, inject_adapter_in_model

    names = list(inputs["adapters"])
    config = LoraConfig(r=inputs["size"]["r"], lora_alpha=16, target_modules=names, use_dora=dora)
    block = inject_adapter_in_model(config, plain_block(inputs))
    for name, (a, b) in inputs["adapters"].items():
        layer = getattr(block, name)
        layer.lora_A["default"].weight.data, layer.lora_B["default"].weight.data = a, b
    return _call(block, inputs)


def _case(name: str, about: str, ours: tuple[Peer, ...], peers: tuple[Peer, ...]) -> Case:
    return Case(
        name=name,
        op="lora",
        about=about,
        axis="T",
        make=make,
        leaves=("x",),
        tiny=sweep(T=(3, 5), D=16, F=24, r=2),
        quick=sweep(T=(64, 512), **_FEED_FORWARD),
        full=sweep(T=(16, 64, 512, 2048), **_FEED_FORWARD),
        ours=ours,
        peers=peers,
        dtypes={"cpu": torch.float32, "cuda": torch.float32},
    )


def _with_peft(name: str, about: str, *, dora: bool) -> Case:
    own = Peer("LoRALinear", lambda i: _call(adapted_block(i, dora=dora), i), call="apply_lora(block, LoRAConfig(…))")
    theirs = Peer("PEFT", lambda i: peft_block(i, dora=dora), "peft", _INSTALL, call="inject_adapter_in_model(…)")
    return _case(name, about, (own,), (theirs,))


CASES = (
    _with_peft(
        "lora", "a gated feed-forward block, width 768, with adapters of rank 8 on its three layers", dora=False
    ),
    _with_peft("dora", "the same with DoRA, whose norms are computed anew in each pass", dora=True),
    _case(
        "lora_cost",
        "the same block with adapters, over 32 and over 4 bits, and without: time and memory alone",
        (
            Peer("LoRALinear", lambda i: _call(adapted_block(i), i, **_COST), call="apply_lora"),
            Peer(
                "LoRALinear over NF4",
                lambda i: _call(adapted_block(i, quantized=True), i, **_COST),
                call="quantize(block, 'nf4', double_quant=True), then apply_lora",
            ),
        ),
        (
            Peer("frozen", lambda i: _call(plain_block(i), i, **_COST), call="no adapters, the gradient of x alone"),
            Peer(
                "all weights train",
                lambda i: _call(plain_block(i).requires_grad_(True), i, **_COST),
                call="no adapters, the gradients of x and of every weight",
            ),
        ),
    ),
)
