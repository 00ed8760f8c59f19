"""Llama, Mistral, Qwen2 and Qwen3: what their configs mean here, and what their tensors are called."""

import math
from typing import Any

from neural_layers.errors import InputError
from neural_layers.models.conversion.fields import SHARED, expect, take

_MIXERS = {"full_attention": "attention", "sliding_attention": "sliding_attention"}
_ROPE_TYPES = ("default", "linear", "dynamic", "yarn", "llama3")
_BRANCHES = {
    "input_layernorm": "mixer.norm",
    "post_attention_layernorm": "feed_forward.norm",
    "self_attn": "mixer.inner",
    "mlp": "feed_forward.inner",
}


def llama(config: Any) -> dict[str, Any]:
    """The fields of `HybridConfig` for a `LlamaConfig`."""
    biases = {"attention_bias": config.attention_bias, "attention_output_bias": config.attention_bias}
    return {**_decoder(config), **biases, "mlp_bias": config.mlp_bias}


def mistral(config: Any) -> dict[str, Any]:
    """The fields of `HybridConfig` for a `MistralConfig`: where it has a window, all layers have."""
    kind = "full_attention" if config.sliding_window is None else "sliding_attention"
    return {**_decoder(config), **_mixers(config, [kind] * config.num_hidden_layers)}


def qwen2(config: Any) -> dict[str, Any]:
    """The fields of `HybridConfig` for a `Qwen2Config`: q, k and v have a bias, o has none."""
    return {**_decoder(config), **_mixers(config, config.layer_types), "attention_bias": True}


def qwen3(config: Any) -> dict[str, Any]:
    """The fields of `HybridConfig` for a `Qwen3Config`."""
    biases = {"attention_bias": config.attention_bias, "attention_output_bias": config.attention_bias}
    return {**_decoder(config), **_mixers(config, config.layer_types), **biases, "qk_norm": True}


def decoder_name(name: str) -> str | None:
    """Our name for a tensor of these models; None for one that is computed here (the tables of RoPE)."""
    if name.endswith("rotary_emb.inv_freq"):
        return None
    parts = name.split(".")
    if len(parts) > 4 and parts[:2] == ["model", "layers"] and parts[3] in _BRANCHES:
        return ".".join([*parts[:3], _BRANCHES[parts[3]], *parts[4:]])
    return name


def decoder_original(name: str) -> str:
    """The name that one of our tensors has there."""
    for theirs, ours in _BRANCHES.items():
        name = name.replace(f".{ours}.", f".{theirs}.")
    return name


def _decoder(config: Any) -> dict[str, Any]:
    expect(config, "hidden_act", ("silu", "swish"))
    sizes = ("intermediate_size", "num_attention_heads", "num_key_value_heads", "head_dim")
    rope, length = _rope(config)
    return {
        **take(config, *SHARED, *sizes, "rms_norm_eps", "attention_dropout"),
        "mixers": ["attention"] * config.num_hidden_layers,
        "rope_parameters": rope,
        "max_position_embeddings": length,
    }


def _mixers(config: Any, layer_types: list[str]) -> dict[str, Any]:
    unknown = sorted(set(layer_types) - set(_MIXERS))
    if unknown:
        raise InputError(
            f"{config.model_type}: layer_types holds {unknown[0]!r}, which is not supported, only {', '.join(_MIXERS)}"
        )
    window = {"sliding_window": config.sliding_window} if "sliding_attention" in layer_types else {}
    return {"mixers": [_MIXERS[kind] for kind in layer_types], **window}


def _rope(config: Any) -> tuple[dict[str, Any], int]:
    """`rope_parameters` as `RotaryEmbedding` takes them, and the longest context that they are meant for."""
    given, length = dict(config.rope_parameters), config.max_position_embeddings
    kind = given.get("rope_type", "default")
    if kind not in _ROPE_TYPES:
        raise InputError(
            f"{config.model_type}: rope_parameters has rope_type={kind!r}, which is not supported, only "
            f"{', '.join(_ROPE_TYPES)}"
        )
    for field, neutral in (("partial_rotary_factor", 1.0), ("truncate", True)):
        if given.get(field, neutral) not in (neutral, None):
            raise InputError(
                f"{config.model_type}: rope_parameters has {field}={given[field]!r}, which is not supported, only "
                f"{neutral!r}"
            )
    rope = {"rope_type": kind, "rope_theta": given["rope_theta"]}
    if kind == "default":
        return rope, length
    # transformers grows the base of "dynamic" beyond max_position_embeddings, whatever else the config says.
    original = length if kind == "dynamic" else given.get("original_max_position_embeddings") or length
    rope["factor"] = given.get("factor") or length / original
    if kind != "linear":
        rope["original_max_position_embeddings"] = original
    if kind == "llama3":
        rope |= {field: given[field] for field in ("low_freq_factor", "high_freq_factor")}
    if kind == "yarn":
        rope |= {field: given[field] for field in ("beta_fast", "beta_slow") if given.get(field)}
        rope["attention_factor"] = _attention_factor(given, rope["factor"])
    return rope, max(length, int(original * rope["factor"]))


def _attention_factor(given: dict[str, Any], factor: float) -> float:
    """What YaRN multiplies cosines and sines by (arXiv 2309.00071), with the two `mscale` of DeepSeek's configs."""
    if given.get("attention_factor") is not None:
        return float(given["attention_factor"])

    def grown(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    both = given.get("mscale"), given.get("mscale_all_dim")
    return grown(both[0]) / grown(both[1]) if both[0] and both[1] else grown(1.0)
