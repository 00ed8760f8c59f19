"""The scan of Mamba-2."""

import torch
from torch import Tensor

from neural_layers.benchmarks.case import Call, Case, Inputs, Maker, Peer, Size, leaf, sweep

NAMES = ("x", "dt", "A", "B", "C", "D", "dt_bias")
DEFAULT_CHUNK = 256
MODELS = "pip install 'neural-layers[models]'"


def make(size: Size, maker: Maker) -> Inputs:
    """All arguments but z, which transformers applies outside of its scan."""
    B, T, H, P, G, N = (size[letter] for letter in "BTHPGN")
    float32 = torch.float32
    return {
        "x": maker.normal(B, T, H, P),
        "dt": 0.5 * maker.normal(B, T, H),
        "A": -torch.linspace(1, 16, H, dtype=float32, device=maker.device),
        "B": maker.normal(B, T, G, N),
        "C": maker.normal(B, T, G, N),
        "D": maker.normal(H, dtype=float32),
        "dt_bias": maker.normal(H, dtype=float32) - 4,
        "dt_softplus": True,
    }


def _tensors(inputs: Inputs) -> dict[str, Tensor]:
    return {name: leaf(inputs[name]) for name in NAMES}


def _transformers(inputs: Inputs, chunk_size: int) -> Call:
    from transformers.models.mamba2.modeling_mamba2 import mamba2_chunk_scan

    t = _tensors(inputs)
    x, dt, A, B, C, D, dt_bias = (t[name] for name in NAMES)
    run = lambda: mamba2_chunk_scan(x, dt, A, B, C, chunk_size, D=D, dt_bias=dt_bias, dt_softplus=True)  # noqa: E731
    return Call(run, tuple(t.values()))


def _transformers_peer(chunk_size: int, name: str, only_full: str = "") -> Peer:
    return Peer(
        name, lambda inputs: _transformers(inputs, chunk_size), "transformers.models.mamba2.modeling_mamba2", MODELS,
        only_full=only_full, call=f"mamba2_chunk_scan(chunk_size={chunk_size})",
    )  # fmt: skip


def mamba_ssm(inputs: Inputs) -> Call:
    """The original Triton kernels."""
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    t = _tensors(inputs)
    x, dt, A, B, C, D, dt_bias = (t[name] for name in NAMES)
    run = lambda: mamba_chunk_scan_combined(  # noqa: E731
        x, dt, A, B, C, DEFAULT_CHUNK, D=D, dt_bias=dt_bias, dt_softplus=True
    )
    return Call(run, tuple(t.values()))


CASES = (
    Case(
        name="ssd_scan",
        op="ssd_scan",
        about="the scan of a Mamba-2 mixer with softplus, bias and D",
        axis="T",
        make=make,
        leaves=NAMES,
        tiny=sweep(B=1, T=(5, 70), H=4, P=8, G=2, N=4),
        quick=sweep(B=1, T=(256, 2048), H=24, P=64, G=1, N=128),
        full=sweep(B=1, T=(256, 1024, 4096, 16384), H=24, P=64, G=1, N=128),
        cuda=sweep(B=1, T=(2048, 8192, 32768), H=64, P=64, G=1, N=128),
        peers=(
            _transformers_peer(DEFAULT_CHUNK, "transformers"),
            _transformers_peer(64, "transformers chunk 64"),
            # Its best chunk is one of the two, by machine and length.
            _transformers_peer(32, "transformers chunk 32", only_full="not with --quick"),
            Peer("mamba_ssm", mamba_ssm, "mamba_ssm",
                 "needs CUDA and a compiler: pip install mamba-ssm --no-build-isolation", "cuda",
                 call="mamba_chunk_scan_combined(chunk_size=256)"),
        ),
    ),
)  # fmt: skip
