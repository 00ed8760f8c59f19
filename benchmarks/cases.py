"""What is measured: each op at a size of real models, with torch's or transformers' own way beside it."""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as tf
from torch import Tensor

import neural_layers.functional as F
from neural_layers.benchmarks.timing import Case


def rms_norm(quick: bool) -> Case:
    """Against torch's layer_norm, which torch fuses on the CPU."""
    rows, width = 1024 if quick else 4096, 1024
    contenders = {
        "neural_layers": F.rms_norm,
        "torch layer_norm": lambda x, weight: tf.layer_norm(x, (width,), weight),
    }
    return Case(f"{rows}×{width}", (torch.randn(rows, width), torch.ones(width)), contenders)


def swiglu(quick: bool) -> Case:
    """Against the two torch calls."""
    shape = (512 if quick else 2048, 2816)
    contenders = {"neural_layers": F.swiglu, "torch eager": lambda gate, up: tf.silu(gate) * up}
    return Case("×".join(map(str, shape)), (torch.randn(shape), torch.randn(shape)), contenders)


def _attention(length: int, ours: Callable[..., Tensor], peer_name: str, peer: Callable[..., Tensor]) -> Case:
    q, k, v = torch.randn(1, length, 8, 64), torch.randn(1, length, 2, 64), torch.randn(1, length, 2, 64)
    return Case(f"T {length}, H 8, G 2, K 64", (q, k, v), {"neural_layers": ours, peer_name: peer})


def _sdpa(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """SDPA, causal where no mask is given."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    return tf.scaled_dot_product_attention(q, k, v, mask, is_causal=mask is None, enable_gqa=True).transpose(1, 2)


def causal_attention(quick: bool) -> Case:
    """Against SDPA, which is at the limit."""
    return _attention(
        512 if quick else 2048,
        lambda q, k, v: F.flash_attention(q, k, v, causal=True),
        "SDPA",
        _sdpa,
    )


def window_attention(quick: bool) -> Case:
    """Window 512 against SDPA with the window's mask, its making counted, as transformers does."""
    length = 1024 if quick else 2048

    def masked(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        distance = torch.arange(length).unsqueeze(1) - torch.arange(length)
        return _sdpa(q, k, v, (distance >= 0) & (distance < 512))

    return _attention(length, lambda q, k, v: F.flash_attention(q, k, v, causal=True, window=512), "SDPA, mask", masked)


def alibi_attention(quick: bool) -> Case:
    """ALiBi against SDPA with the bias written out."""
    from neural_layers.position import alibi_slopes

    length, slopes = 512 if quick else 2048, alibi_slopes(8)

    def biased(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        distance = torch.arange(length).unsqueeze(1) - torch.arange(length)
        bias = torch.where(distance >= 0, -slopes.view(-1, 1, 1) * distance, float("-inf"))
        return _sdpa(q, k, v, bias)

    return _attention(
        length, lambda q, k, v: F.flash_attention(q, k, v, causal=True, alibi_slopes=slopes), "SDPA, bias", biased
    )


def selective_scan(quick: bool) -> Case:
    """Against a loop over time, which is what transformers runs without CUDA."""
    length, width, states = 256 if quick else 1024, 384 if quick else 1536, 16
    inputs = (
        torch.randn(1, length, width),
        torch.randn(1, length, width) - 4,
        -torch.rand(width, states) - 0.1,
        torch.randn(1, length, states),
        torch.randn(1, length, states),
    )
    contenders: dict[str, Callable[..., Any]] = {
        "neural_layers": lambda *args: F.selective_scan(*args, delta_softplus=True),
        "loop over time": lambda *args: F.selective_scan(*args, delta_softplus=True, backend="reference"),
    }
    return Case(f"T {length}, E {width}, N {states}", inputs, contenders)


CASES: dict[str, Callable[[bool], Case]] = {
    case.__name__: case
    for case in (rms_norm, swiglu, causal_attention, window_attention, alibi_attention, selective_scan)
}
