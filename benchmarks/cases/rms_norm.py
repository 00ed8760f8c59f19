"""RMSNorm: the norm of every block."""

import torch
import torch.nn.functional as tf

from neural_layers.benchmarks.case import Call, Case, Inputs, Maker, Peer, Size, sweep
from neural_layers.benchmarks.limits import bytes_of, copy_limit

EPS = 1e-6


def make(size: Size, maker: Maker) -> Inputs:
    """x (rows, D) and its weight."""
    return {"x": maker.normal(size["rows"], size["D"]), "weight": 1 + 0.1 * maker.normal(size["D"]), "eps": EPS}


def transformers(inputs: Inputs) -> Call:
    """The module of all Llama-like models; Mamba's is the same code."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    x, weight = inputs["x"], inputs["weight"]
    norm = LlamaRMSNorm(x.shape[-1], eps=EPS)
    norm.weight = torch.nn.Parameter(weight.detach())
    return Call(lambda: norm(x), (x, norm.weight))


def torch_rms_norm(inputs: Inputs) -> Call:
    """Torch's own."""
    x, weight = inputs["x"], inputs["weight"]
    return Call(lambda: tf.rms_norm(x, x.shape[-1:], weight, EPS), (x, weight))


def layer_norm(inputs: Inputs) -> Call:
    """Another norm, which torch fuses on the CPU: the speed to match. Its output is not comparable."""
    x, weight = inputs["x"], inputs["weight"]
    expected = tf.rms_norm(x.detach(), x.shape[-1:], weight.detach(), EPS)
    return Call(lambda: tf.layer_norm(x, x.shape[-1:], weight), (x, weight), compare=lambda output: expected)


def compiled(inputs: Inputs) -> Call:
    """The transformers formula through inductor."""
    x, weight = inputs["x"], inputs["weight"]

    def formula(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        wide = x.float()
        return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + EPS)).to(x.dtype)

    fused = torch.compile(formula, dynamic=False)
    return Call(lambda: fused(x, weight), (x, weight))


def liger(inputs: Inputs) -> Call:
    """Liger's Triton kernel, which may write its gradient over the incoming one: not here, where that is reused."""
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    x, weight = inputs["x"], inputs["weight"]
    return Call(lambda: LigerRMSNormFunction.apply(x, weight, EPS, 0.0, "llama", False), (x, weight))


CASES = (
    Case(
        name="rms_norm",
        op="rms_norm",
        about="RMSNorm of rows × D",
        axis="rows",
        make=make,
        leaves=("x", "weight"),
        tiny=sweep(rows=(3, 5), D=16),
        quick=sweep(rows=(512, 4096), D=1024),
        full=sweep(rows=(64, 512, 4096, 16384), D=1024),
        cuda=sweep(rows=(4096, 16384, 65536), D=4096),
        peers=(
            Peer("transformers", transformers, "transformers.models.llama.modeling_llama",
                 "pip install 'neural-layers[models]'", call="LlamaRMSNorm"),
            Peer("torch rms_norm", torch_rms_norm, call="torch.nn.functional.rms_norm"),
            Peer("torch layer_norm", layer_norm, call="torch.nn.functional.layer_norm: another norm, fused in torch"),
            Peer("torch.compile", compiled, only_full="takes 15 s to compile: not with --quick",
                 call="the formula of transformers, compiled by inductor"),
            Peer("Liger", liger, "liger_kernel.ops.rms_norm", "pip install liger-kernel", "cuda",
                 call="LigerRMSNormFunction, in_place=False"),
        ),
        # forward reads x and writes y; backward reads x and the gradient of y and writes that of x
        limit=copy_limit(lambda i: bytes_of(i, "x", "x"), lambda i: bytes_of(i, "x", "x", "x", "x", "x")),
    ),
)  # fmt: skip
