"""Attention: causal, with a window, with ALiBi."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as tf
from torch import Tensor

from neural_layers.benchmarks.case import Call, Case, Inputs, Maker, Peer, Size, leaf, sweep
from neural_layers.benchmarks.limits import product_limit

WINDOW, TINY_WINDOW = 512, 3
MODELS = "pip install 'neural-layers[models]'"
FLASH = "needs CUDA and a compiler: pip install 'neural-layers[flash]'"
SLOW_FROM = 4096  # tokens; forward + backward with a mask takes 10 s at 8192


def make(size: Size, maker: Maker) -> Inputs:
    """q (B, T, H, K), k and v (B, T, G, K)."""
    B, T, H, G, K = (size[letter] for letter in "BTHGK")
    return {"q": maker.normal(B, T, H, K), "k": maker.normal(B, T, G, K), "v": maker.normal(B, T, G, K), "causal": True}


def make_window(size: Size, maker: Maker) -> Inputs:
    """The same with a window."""
    return {**make(size, maker), "window": WINDOW if size["T"] > TINY_WINDOW**2 else TINY_WINDOW}


def make_alibi(size: Size, maker: Maker) -> Inputs:
    """The same with slopes, which get no gradient."""
    from neural_layers import alibi_slopes

    return {**make(size, maker), "alibi_slopes": alibi_slopes(size["H"]).to(maker.device)}


def _heads_first(inputs: Inputs) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v in torch's layout (B, H, T, K)."""
    return leaf(inputs["q"].transpose(1, 2)), leaf(inputs["k"].transpose(1, 2)), leaf(inputs["v"].transpose(1, 2))


def _back(out: Any) -> Tensor:
    return out.transpose(1, 2)


def _sdpa(inputs: Inputs, mask: Callable[[], Tensor | None]) -> Call:
    """torch's attention, with a mask made anew in each call where there is one."""
    q, k, v = _heads_first(inputs)

    def run() -> Tensor:
        made = mask()
        return tf.scaled_dot_product_attention(q, k, v, made, is_causal=made is None, enable_gqa=True)

    return Call(run, (q, k, v), _back)


def sdpa_causal(inputs: Inputs) -> Call:
    """No mask is needed."""
    return _sdpa(inputs, lambda: None)


def window_mask(inputs: Inputs) -> Tensor:
    """True where a key counts, in the cheapest way."""
    length = inputs["q"].shape[1]
    everything = torch.ones(length, length, dtype=torch.bool, device=inputs["q"].device)
    return everything.tril().triu_(1 - inputs["window"])


def sdpa_window(inputs: Inputs) -> Call:
    """The mask made in the call."""
    return _sdpa(inputs, lambda: window_mask(inputs))


def sdpa_window_given(inputs: Inputs) -> Call:
    """The mask made beforehand."""
    mask = window_mask(inputs)
    return _sdpa(inputs, lambda: mask)


def transformers_window(inputs: Inputs) -> Call:
    """Mask and attention as transformers' Mistral makes them."""
    from transformers.integrations.sdpa_attention import sdpa_attention_forward
    from transformers.masking_utils import sdpa_mask, sliding_window_causal_mask_function

    q, k, v = _heads_first(inputs)
    (batch, heads, length, _), window = q.shape, inputs["window"]
    module: Any = SimpleNamespace(num_key_value_groups=heads // k.shape[1], is_causal=True)

    def run() -> Tensor:
        seen = sliding_window_causal_mask_function(window)
        mask = sdpa_mask(batch, length, length, mask_function=seen, local_size=window, device=q.device)
        return sdpa_attention_forward(module, q, k, v, mask)[0]

    return Call(run, (q, k, v))


def alibi_bias(inputs: Inputs) -> Tensor:
    """−slope · distance for each head, −∞ for keys to come: (H, T, T)."""
    q, slopes = inputs["q"], inputs["alibi_slopes"]
    at = torch.arange(q.shape[1], device=q.device, dtype=q.dtype)
    distance = at.unsqueeze(1) - at
    distance = distance.masked_fill_(distance < 0, float("inf"))
    return -slopes.to(q.dtype).view(-1, 1, 1) * distance


def sdpa_alibi(inputs: Inputs) -> Call:
    """The bias made in the call."""
    return _sdpa(inputs, lambda: alibi_bias(inputs))


def sdpa_alibi_given(inputs: Inputs) -> Call:
    """The bias made beforehand."""
    bias = alibi_bias(inputs)
    return _sdpa(inputs, lambda: bias)


def flash_attn(inputs: Inputs) -> Call:
    """The CUDA kernel, in its layout (B, T, H, K), which is ours."""
    from flash_attn import flash_attn_func

    q, k, v = (leaf(inputs[name]) for name in "qkv")
    window = (inputs["window"] - 1, 0) if "window" in inputs else (-1, -1)
    slopes = inputs.get("alibi_slopes")
    return Call(lambda: flash_attn_func(q, k, v, causal=True, window_size=window, alibi_slopes=slopes), (q, k, v))


def multiplications(inputs: Inputs) -> float:
    """Of the two products of the forward: scores and outputs of all visited pairs of query and key."""
    batch, length, heads, width = inputs["q"].shape
    window = min(inputs.get("window", length), length)
    pairs = window * (window + 1) / 2 + (length - window) * window
    return 2.0 * batch * heads * pairs * width


def long_backward(size: Size, effort: str) -> str | None:
    """Only in a recording."""
    return "takes 10 s a call: not with --quick" if size["T"] > SLOW_FROM and effort != "full" else None


def _case(
    name: str,
    about: str,
    make: Callable[[Size, Maker], Inputs],
    lengths: tuple[int, ...],
    quick: tuple[int, ...],
    peers: tuple[Peer, ...],
) -> Case:
    flash = Peer("flash_attn", flash_attn, "flash_attn", FLASH, "cuda", call="flash_attn_func")
    return Case(
        name=name,
        op="flash_attention",
        about=about,
        axis="T",
        make=make,
        leaves=("q", "k", "v"),
        tiny=sweep(B=1, T=(5, 9), H=4, G=2, K=8),
        quick=sweep(B=1, T=quick, H=8, G=2, K=64),
        full=sweep(B=1, T=lengths, H=8, G=2, K=64),
        cuda=sweep(B=1, T=(2048, 8192, 16384), H=32, G=8, K=128),
        peers=(*peers, flash),
        # the backward computes the scores again, and four more products
        limit=product_limit(multiplications, lambda i: 3.5 * multiplications(i)),
    )


CASES = (
    _case("flash_attention", "causal attention", make, (128, 512, 2048, 8192), (256, 2048), (
        Peer("SDPA", sdpa_causal, call="scaled_dot_product_attention(is_causal=True, enable_gqa=True)"),
    )),
    _case("flash_attention_window", f"causal attention with a window of {WINDOW}", make_window,
          (1024, 2048, 4096, 8192), (2048, 8192), (
        Peer("SDPA + mask", sdpa_window, skip_backward=long_backward,
             call="scaled_dot_product_attention with a mask made in each call"),
        Peer("SDPA, mask given", sdpa_window_given, only_full="its mask made beforehand: not with --quick",
             call="the same, with the mask made beforehand"),
        Peer("transformers", transformers_window, "transformers.masking_utils", MODELS, skip_backward=long_backward,
             call="sdpa_mask and sdpa_attention_forward, as in Mistral"),
    )),
    _case("flash_attention_alibi", "causal attention with ALiBi", make_alibi, (128, 512, 2048, 8192), (256, 2048), (
        Peer("SDPA + bias", sdpa_alibi, call="scaled_dot_product_attention with a bias made in each call"),
        Peer("SDPA, bias given", sdpa_alibi_given, only_full="its bias made beforehand: not with --quick",
             call="the same, with the bias made beforehand"),
    )),
)  # fmt: skip
