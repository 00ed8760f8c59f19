"""One layer of the hybrid model from its config."""

import math
from typing import Any

from torch import nn

from neural_layers.attention import GroupedQueryAttention
from neural_layers.block import EnhancedBlock
from neural_layers.feed_forward import SwiGLU
from neural_layers.mamba import Mamba
from neural_layers.mamba2 import Mamba2
from neural_layers.models.hybrid.config import HybridConfig
from neural_layers.norm import RMSNorm
from neural_layers.position import RotaryEmbedding


def build_block(config: HybridConfig, index: int, rotary: RotaryEmbedding | None) -> EnhancedBlock:
    """Layer `index`, pre-norm: the mixer, then SwiGLU where the config has one."""
    width = config.intermediate_size
    return EnhancedBlock(
        config.hidden_size,
        mixer=build_mixer(config, index, rotary),
        feed_forward=SwiGLU(config.hidden_size, width, bias=config.mlp_bias) if width else None,
        dropout=config.dropout,
        norm_eps=config.rms_norm_eps,
    )


def build_mixer(config: HybridConfig, index: int, rotary: RotaryEmbedding | None) -> nn.Module:
    """The mixer of layer `index`; attention layers share `rotary`."""
    mixer = (config.mixers or [])[index]
    if mixer == "mamba":
        return Mamba(
            config.hidden_size,
            config.mamba_d_state,
            config.mamba_d_conv,
            config.mamba_expand,
            config.mamba_dt_rank,
            inner_dim=config.mamba_inner_size,
            bias=config.mamba_bias,
            conv_bias=config.mamba_conv_bias,
        )
    if mixer == "mamba2":
        return Mamba2(config.hidden_size, **mamba2_options(config, index, rotary))
    attention = GroupedQueryAttention(
        config.hidden_size,
        config.num_attention_heads,
        config.num_key_value_heads,
        config.attention_head_dim,
        position=rotary if config.position_embedding == "rope" else config.position_embedding,
        window=config.sliding_window if mixer == "sliding_attention" else None,
        qk_norm=config.qk_norm,
        dropout=config.attention_dropout,
        bias=config.attention_bias,
        output_bias=config.attention_output_bias,
    )
    for norm in (attention.q_norm, attention.k_norm):
        if isinstance(norm, RMSNorm):
            norm.eps = config.rms_norm_eps
    return attention


def mamba2_options(config: HybridConfig, index: int, rotary: RotaryEmbedding | None) -> dict[str, Any]:
    """The arguments of layer `index`'s `Mamba2`: those of the config's fields, and its own in their place."""
    own = dict((config.mamba2_layers or {}).get(str(index), {}))
    if own.pop("rotary", False):
        own["rotary"] = rotary
    return {
        "state_dim": config.mamba2_d_state,
        "head_dim": config.mamba2_head_dim,
        "num_groups": config.mamba2_n_groups,
        "conv_width": config.mamba2_d_conv,
        "expand": config.mamba2_expand,
        "norm_eps": config.mamba2_norm_eps,
        "bias": config.mamba2_bias,
        "conv_bias": config.mamba2_conv_bias,
        "step_limit": tuple(config.mamba2_step_limit or (0.0, math.inf)),
        **own,
    }
