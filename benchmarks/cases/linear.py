"""The linear layer at the rows of a decoding step. The weight is larger than the caches, as those of a model are."""

import torch.nn.functional as tf

from neural_layers.benchmarks.case import Call, Case, Inputs, Maker, Peer, Size, sweep
from neural_layers.benchmarks.limits import bytes_of, copy_limit


def make(size: Size, maker: Maker) -> Inputs:
    """x (rows, inputs) and weight (outputs, inputs)."""
    return {"x": maker.normal(size["rows"], size["inputs"]), "weight": maker.normal(size["outputs"], size["inputs"])}


def eager(inputs: Inputs) -> Call:
    """torch's own, which takes MKL's product."""
    return Call(lambda: tf.linear(inputs["x"], inputs["weight"]))


def _case(name: str, about: str, inputs: int, outputs: int) -> Case:
    return Case(
        name=name,
        op="linear",
        about=about,
        axis="rows",
        make=make,
        leaves=(),
        tiny=sweep(rows=(1, 5), inputs=6, outputs=7),
        quick=sweep(rows=(1, 4), inputs=inputs, outputs=outputs),
        full=sweep(rows=(1, 2, 4, 16), inputs=inputs, outputs=outputs),
        peers=(Peer("torch linear", eager, call="torch.nn.functional.linear"),),
        # a copy moves each byte twice, and the product only reads
        limit=copy_limit(lambda i: bytes_of(i, "weight")),
    )


CASES = (
    _case("linear", "a linear layer of few rows, 4096 inputs", 4096, 4096),
    _case("linear_narrow", "a linear layer of few rows, 384 inputs", 384, 49152),
)
