"""SwiGLU and GeGLU: the gates of the feed-forward layers."""

from collections.abc import Callable

import torch.nn.functional as tf

from neural_layers.benchmarks.case import Call, Case, Inputs, Maker, Peer, Size, sweep
from neural_layers.benchmarks.limits import bytes_of, copy_limit


def make(size: Size, maker: Maker) -> Inputs:
    """gate and up (rows, F)."""
    shape = size["rows"], size["F"]
    return {"gate": maker.normal(*shape), "up": maker.normal(*shape)}


def eager_swiglu(inputs: Inputs) -> Call:
    """As in transformers' LlamaMLP."""
    gate, up = inputs["gate"], inputs["up"]
    return Call(lambda: tf.silu(gate) * up, (gate, up))


def eager_geglu(inputs: Inputs) -> Call:
    """As in transformers' GemmaMLP."""
    gate, up = inputs["gate"], inputs["up"]
    return Call(lambda: tf.gelu(gate, approximate="tanh") * up, (gate, up))


def liger_swiglu(inputs: Inputs) -> Call:
    """Liger's Triton kernel."""
    from liger_kernel.ops.swiglu import LigerSiLUMulFunction

    gate, up = inputs["gate"], inputs["up"]
    return Call(lambda: LigerSiLUMulFunction.apply(gate, up), (gate, up))


def liger_geglu(inputs: Inputs) -> Call:
    """Liger's Triton kernel."""
    from liger_kernel.ops.geglu import LigerGELUMulFunction

    gate, up = inputs["gate"], inputs["up"]
    return Call(lambda: LigerGELUMulFunction.apply(gate, up), (gate, up))


def _case(op: str, eager: Peer, liger: Peer) -> Case:
    return Case(
        name=op,
        op=op,
        about=f"{op} of rows × F",
        axis="rows",
        make=make,
        leaves=("gate", "up"),
        tiny=sweep(rows=(3, 5), F=16),
        quick=sweep(rows=(256, 2048), F=2816),
        full=sweep(rows=(64, 512, 2048, 8192), F=2816),
        cuda=sweep(rows=(2048, 8192, 32768), F=14336),
        peers=(eager, liger),
        # forward reads two and writes one; backward reads three and writes two
        limit=copy_limit(
            lambda i: bytes_of(i, "gate", "gate", "up"),
            lambda i: bytes_of(i, "gate", "gate", "up", "gate", "up", "gate", "gate", "up"),
        ),
    )


def _liger(prepare: Callable[[Inputs], Call], module: str, call: str) -> Peer:
    # Liger's backward writes over the saved gate and up, so that a second one would be wrong; each call runs one.
    return Peer("Liger", prepare, module, "pip install liger-kernel", "cuda", call=call)


CASES = (
    _case("swiglu", Peer("torch eager", eager_swiglu, call="silu(gate) * up"),
          _liger(liger_swiglu, "liger_kernel.ops.swiglu", "LigerSiLUMulFunction")),
    _case("geglu", Peer("torch eager", eager_geglu, call="gelu(gate, approximate='tanh') * up"),
          _liger(liger_geglu, "liger_kernel.ops.geglu", "LigerGELUMulFunction")),
)  # fmt: skip
