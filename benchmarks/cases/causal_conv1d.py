"""The causal depthwise convolution of Mamba."""

from torch import Tensor

from neural_layers.benchmarks.case import Call, Case, Inputs, Maker, Peer, Size, leaf, sweep
from neural_layers.benchmarks.limits import bytes_of, copy_limit


def make(size: Size, maker: Maker) -> Inputs:
    """x (B, T, E), four taps and a bias, with silu, as in Mamba."""
    B, T, E, W = (size[letter] for letter in "BTEW")
    weight, bias = maker.normal(E, W) / W**0.5, maker.normal(E)
    return {"x": maker.normal(B, T, E), "weight": weight, "bias": bias, "activation": "silu"}


def _channels_first(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    return leaf(inputs["x"].transpose(1, 2)), leaf(inputs["weight"]), leaf(inputs["bias"])


def _back(y: Tensor) -> Tensor:
    return y.transpose(1, 2)


def transformers(inputs: Inputs) -> Call:
    """What every Mamba of transformers runs where causal_conv1d is missing: torch's conv1d with padding, cut, silu."""
    from transformers.models.mamba.modeling_mamba import causal_conv1d_fn

    leaves = _channels_first(inputs)
    return Call(lambda: causal_conv1d_fn(*leaves, activation="silu"), leaves, _back)


def causal_conv1d(inputs: Inputs) -> Call:
    """The CUDA kernel."""
    from causal_conv1d import causal_conv1d_fn

    leaves = _channels_first(inputs)
    return Call(lambda: causal_conv1d_fn(*leaves, activation="silu"), leaves, _back)


CASES = (
    Case(
        name="causal_conv1d",
        op="causal_conv1d",
        about="the convolution of a Mamba mixer, with bias and silu",
        axis="T",
        make=make,
        leaves=("x", "weight", "bias"),
        tiny=sweep(B=1, T=(5, 9), E=6, W=4),
        quick=sweep(B=1, T=(256, 2048), E=1536, W=4),
        full=sweep(B=1, T=(128, 512, 2048, 8192), E=1536, W=4),
        cuda=sweep(B=1, T=(512, 2048, 8192, 32768), E=4096, W=4),
        peers=(
            Peer("torch conv1d + silu", transformers, "transformers.models.mamba.modeling_mamba",
                 "pip install 'neural-layers[models]'", call="causal_conv1d_fn of transformers, on (B, E, T)"),
            Peer("causal_conv1d", causal_conv1d, "causal_conv1d",
                 "needs CUDA and a compiler: pip install causal-conv1d --no-build-isolation", "cuda",
                 call="causal_conv1d_fn"),
        ),
        # forward reads x and writes y; backward reads x and the gradient of y and writes that of x
        limit=copy_limit(lambda i: bytes_of(i, "x", "x"), lambda i: bytes_of(i, "x", "x", "x", "x", "x")),
    ),
)  # fmt: skip
