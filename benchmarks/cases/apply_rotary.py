"""The rotary position embedding."""

import torch

from neural_layers.benchmarks.case import Call, Case, Inputs, Maker, Peer, Size, leaf, sweep
from neural_layers.benchmarks.limits import bytes_of, copy_limit


def make(size: Size, maker: Maker) -> Inputs:
    """x (B, T, H, K), and the angles of its positions."""
    B, T, H, K = (size[letter] for letter in "BTHK")
    speeds = 10000.0 ** -(torch.arange(0, K, 2) / K)
    angles = torch.arange(T).unsqueeze(1) * speeds
    cos, sin = (table.to(maker.device, maker.dtype) for table in (angles.cos(), angles.sin()))
    return {"x": maker.normal(B, T, H, K), "cos": cos, "sin": sin}


def transformers(inputs: Inputs) -> Call:
    """What all Llama-like models run, in their layout (B, H, T, K); the keys it also takes are given no head."""
    from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

    x = leaf(inputs["x"].transpose(1, 2))
    cos, sin = (torch.cat([inputs[name], inputs[name]], dim=-1).unsqueeze(0) for name in ("cos", "sin"))
    none = x.detach()[:, :0]
    return Call(lambda: apply_rotary_pos_emb(x, none, cos, sin)[0], (x,), lambda y: y.transpose(1, 2))


CASES = (
    Case(
        name="apply_rotary",
        op="apply_rotary",
        about="rotary embedding of the queries",
        axis="T",
        make=make,
        leaves=("x",),
        tiny=sweep(B=1, T=(3, 5), H=2, K=8),
        quick=sweep(B=1, T=(256, 2048), H=8, K=64),
        full=sweep(B=1, T=(128, 512, 2048, 8192), H=8, K=64),
        cuda=sweep(B=1, T=(512, 2048, 8192, 32768), H=32, K=128),
        peers=(
            Peer("transformers", transformers, "transformers.models.llama.modeling_llama",
                 "pip install 'neural-layers[models]'", call="apply_rotary_pos_emb, without keys"),
        ),
        # forward reads x and writes y; backward does the same with the gradient
        limit=copy_limit(lambda i: bytes_of(i, "x", "x"), lambda i: bytes_of(i, "x", "x", "x", "x")),
    ),
)  # fmt: skip
