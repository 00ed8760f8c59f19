"""Mamba and Mamba-2: what their configs mean here, and what their tensors are called."""

from typing import Any

from neural_layers.models.conversion.fields import SHARED, expect, take

# These models have no limit of their own, and a config here has one: larger than any text they were tried on.
LONGEST = 1 << 20
_NAMES = {
    "backbone.embedding.weight": "model.embed_tokens.weight",  # in checkpoints of the reference code
    "backbone.embeddings.weight": "model.embed_tokens.weight",
    "backbone.norm_f.weight": "model.norm.weight",
}


def mamba(config: Any) -> dict[str, Any]:
    """The fields of `HybridConfig` for a `MambaConfig`."""
    return {
        **_decoder(config, "mamba"),
        "mamba_d_state": config.state_size,
        "mamba_d_conv": config.conv_kernel,
        "mamba_expand": config.expand,
        "mamba_dt_rank": config.time_step_rank,
        "mamba_bias": config.use_bias,
        "mamba_conv_bias": config.use_conv_bias,
    }


def mamba2(config: Any) -> dict[str, Any]:
    """The fields of `HybridConfig` for a `Mamba2Config`."""
    limit = [float(bound) for bound in config.time_step_limit]
    return {
        **_decoder(config, "mamba2"),
        "mamba2_d_state": config.state_size,
        "mamba2_d_conv": config.conv_kernel,
        "mamba2_expand": config.expand,
        "mamba2_head_dim": config.head_dim,
        "mamba2_n_groups": config.n_groups,
        "mamba2_bias": config.use_bias,
        "mamba2_conv_bias": config.use_conv_bias,
        "mamba2_norm_eps": config.layer_norm_epsilon,
        "mamba2_step_limit": None if limit == [0.0, float("inf")] else limit,
    }


def recurrent_name(name: str) -> str | None:
    """Our name for a tensor of these models."""
    parts = name.split(".")
    if len(parts) > 4 and parts[:2] == ["backbone", "layers"] and parts[3] in ("norm", "mixer"):
        inner = ["mixer", "norm"] if parts[3] == "norm" else ["mixer", "inner"]
        return ".".join(["model", "layers", parts[2], *inner, *parts[4:]])
    return _NAMES.get(name, name)


def recurrent_original(name: str) -> str:
    """The name that one of our tensors has there."""
    names = {ours: theirs for theirs, ours in _NAMES.items()}
    layer = name.replace(".mixer.norm.", ".norm.").replace(".mixer.inner.", ".mixer.")
    return names.get(name, layer.replace("model.layers.", "backbone.layers."))


def _decoder(config: Any, mixer: str) -> dict[str, Any]:
    expect(config, "hidden_act", ("silu", "swish"))
    return {
        **take(config, *SHARED),
        "mixers": [mixer] * config.num_hidden_layers,
        "intermediate_size": 0,
        "num_attention_heads": 1,
        "position_embedding": None,
        "max_position_embeddings": LONGEST,
        "rms_norm_eps": config.layer_norm_epsilon,
    }
