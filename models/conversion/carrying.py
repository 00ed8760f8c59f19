"""An attention layer's weights in a Mamba-2 layer.

Letters: D width, E = H · K inner width, H query heads, G key/value heads, K head width.
"""

import math
from typing import Any

import torch
from torch import Tensor

from neural_layers.attention import GroupedQueryAttention
from neural_layers.models.hybrid import HybridConfig
from neural_layers.position import alibi_slopes

CONV_WIDTH = 4
# What a token counts for falls by e^−DECAY with each token that follows. On a character model of four layers, of 0.03,
# 0.1 and 0.3 each was best for some of the layers that were replaced; 0.03 for none.
DECAY = 0.2
_OPEN_GATE = 1.2784645427610738  # silu of it is 1


def mamba2_layer(config: HybridConfig) -> dict[str, Any]:
    """The arguments of a `Mamba2` that an attention layer of `config` fits into: a head for each query head, a group
    and a state of the head's width for each, q's and k's norm and rotation for C and B."""
    return {
        "state_dim": config.attention_head_dim,
        "head_dim": config.attention_head_dim,
        "num_groups": config.num_attention_heads,
        "inner_dim": config.num_attention_heads * config.attention_head_dim,
        "conv_width": CONV_WIDTH,
        "norm_eps": config.rms_norm_eps,
        "bias": True,
        "output_bias": config.attention_output_bias,
        "conv_bias": True,
        "activation": None,
        "bc_norm": config.qk_norm,
        "rotary": config.position_embedding == "rope",
    }


@torch.no_grad()
def carry(attention: GroupedQueryAttention, mixer: Any, input_scale_D: Tensor) -> None:
    """Fill the `Mamba2` `mixer` with the weights of `attention`: q → C, k → B, v → x, o → out, each number as it is.

    Heads of k and v are repeated for the query heads that they serve. Of the rest, the convolution passes its input
    on, the gate is 1, D = 0, Δ = 1 whatever the input, and A = −DECAY (with ALiBi, minus the head's slope): linear
    attention whose weights fall with the distance. The norm's weight is the size that v has where the layer's input is
    white noise times `input_scale_D` (the weight of the norm before it).
    """
    inner, per_group = mixer.widths[0], attention.num_heads // attention.num_kv_heads
    heads, width = attention.num_heads, attention.head_dim

    def repeated(rows: Tensor) -> Tensor:
        return rows.unflatten(0, (-1, width)).repeat_interleave(per_group, dim=0).flatten(0, 1)

    mixer.in_proj.weight.zero_()
    mixer.in_proj.bias.zero_()
    for position, projection in enumerate((attention.v_proj, attention.k_proj, attention.q_proj), start=1):
        rows = slice(position * inner, (position + 1) * inner)
        rearranged = repeated if projection is not attention.q_proj else torch.clone
        mixer.in_proj.weight[rows] = rearranged(projection.weight)
        if projection.bias is not None:
            mixer.in_proj.bias[rows] = rearranged(projection.bias)
    mixer.in_proj.bias[:inner] = _OPEN_GATE
    mixer.out_proj.load_state_dict(attention.o_proj.state_dict())
    if mixer.C_norm.state_dict():
        mixer.C_norm.load_state_dict(attention.q_norm.state_dict())
        mixer.B_norm.load_state_dict(attention.k_norm.state_dict())

    mixer.conv1d.weight.zero_()
    mixer.conv1d.weight[..., -1] = 1.0
    mixer.conv1d.bias.zero_()
    mixer.dt_bias.fill_(math.log(math.expm1(1.0)))  # softplus of it is 1
    slopes = attention.attention.alibi_heads
    decay_H = torch.full((heads,), DECAY) if slopes is None else alibi_slopes(heads)
    mixer.A_log.copy_(decay_H.log())
    mixer.D.zero_()
    values_ED = mixer.in_proj.weight[inner : 2 * inner] * input_scale_D
    variance_E = values_ED.square().sum(1) + mixer.in_proj.bias[inner : 2 * inner].square()
    size_H = variance_E.unflatten(0, (heads, width)).mean(1).sqrt()
    mixer.norm.weight.copy_(size_H.repeat_interleave(width))
