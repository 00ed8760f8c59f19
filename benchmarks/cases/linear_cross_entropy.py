"""Cross-entropy from the hidden states."""

import torch
import torch.nn.functional as tf

from neural_layers.benchmarks.case import Call, Case, Inputs, Maker, Peer, Size, sweep
from neural_layers.benchmarks.limits import product_limit


def make(size: Size, maker: Maker) -> Inputs:
    """hidden (rows, D), weight (V, D), targets."""
    rows, D, V = size["rows"], size["D"], size["V"]
    return {
        "hidden": maker.normal(rows, D),
        "weight": maker.normal(V, D) / D**0.5,
        "target": maker.integers(V, rows),
    }


def full_logits(inputs: Inputs) -> Call:
    """All the logits, as transformers computes its loss."""
    hidden, weight, target = inputs["hidden"], inputs["weight"], inputs["target"]
    return Call(lambda: tf.cross_entropy(tf.linear(hidden, weight), target), (hidden, weight))


def torch_chunked(inputs: Inputs) -> Call:
    """torch's own chunked loss."""
    hidden, weight, target = inputs["hidden"], inputs["weight"], inputs["target"]
    options = torch.nn.LinearCrossEntropyOptions()
    return Call(lambda: tf.linear_cross_entropy(hidden, weight, target, options=options), (hidden, weight))


def liger(inputs: Inputs) -> Call:
    """Liger's chunked loss."""
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    hidden, weight, target = inputs["hidden"], inputs["weight"], inputs["target"]

    def run() -> torch.Tensor:
        made = LigerFusedLinearCrossEntropyFunction.apply(hidden, weight, target)
        return made[0] if isinstance(made, tuple) else made

    return Call(run, (hidden, weight))


def products(inputs: Inputs) -> float:
    """rows · V · D: the logits."""
    return float(inputs["hidden"].numel()) * inputs["weight"].shape[0]


def _case(
    name: str, about: str, *, V: int, D: int, quick: tuple[int, ...], full: tuple[int, ...], cuda: tuple[Size, ...] = ()
) -> Case:
    return Case(
        name=name,
        op="linear_cross_entropy",
        about=about,
        axis="rows",
        make=make,
        leaves=("hidden", "weight"),
        tiny=sweep(rows=(3, 5), D=8, V=11),
        quick=sweep(rows=quick, D=D, V=V),
        full=sweep(rows=full, D=D, V=V),
        cuda=cuda,
        peers=(
            Peer("full logits", full_logits, call="cross_entropy(linear(hidden, weight))"),
            Peer(
                "torch chunked",
                torch_chunked,
                only_full="takes 3 s a call: not with --quick",
                call="torch.nn.functional.linear_cross_entropy, its default options",
            ),
            Peer(
                "Liger",
                liger,
                "liger_kernel.ops.fused_linear_cross_entropy",
                "pip install liger-kernel",
                "cuda",
                call="LigerFusedLinearCrossEntropyFunction",
            ),
        ),
        limit=product_limit(products, lambda i: 3 * products(i)),
    )


CASES = (
    _case("linear_cross_entropy", "cross-entropy of rows × D over V words", V=32000, D=512, quick=(128, 512),
          full=(128, 512, 2048, 8192), cuda=sweep(rows=(2048, 8192), D=4096, V=128256)),
    _case("linear_cross_entropy_152k", "the same over the vocabulary of Qwen2", V=151936, D=896, quick=(),
          full=(256, 2048)),
)  # fmt: skip
