"""One layer of the hybrid model from its config."""

from torch import nn

from neural_layers.attention import GroupedQueryAttention
from neural_layers.block import EnhancedBlock
from neural_layers.feed_forward import SwiGLU
from neural_layers.mamba import Mamba
from neural_layers.mamba2 import Mamba2
from neural_layers.models.hybrid.config import HybridConfig
from neural_layers.norm import RMSNorm
from neural_layers.position import RotaryEmbedding


def build_block(config: HybridConfig, mixer: str, rotary: RotaryEmbedding | None) -> EnhancedBlock:
    """Pre-norm: the mixer, then SwiGLU where the config has one."""
    width = config.intermediate_size
    return EnhancedBlock(
        config.hidden_size,
        mixer=build_mixer(config, mixer, rotary),
        feed_forward=SwiGLU(config.hidden_size, width) if width else None,
        dropout=config.dropout,
        norm_eps=config.rms_norm_eps,
    )


def build_mixer(config: HybridConfig, mixer: str, rotary: RotaryEmbedding | None) -> nn.Module:
    """The mixer of this name; attention layers share `rotary`."""
    if mixer == "mamba":
        return Mamba(
            config.hidden_size,
            config.mamba_d_state,
            config.mamba_d_conv,
            config.mamba_expand,
            config.mamba_dt_rank,
        )
    if mixer == "mamba2":
        return Mamba2(
            config.hidden_size,
            config.mamba2_d_state,
            config.mamba2_head_dim,
            config.mamba2_n_groups,
            config.mamba2_d_conv,
            config.mamba2_expand,
        )
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
