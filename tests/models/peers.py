"""Small random models of transformers for the conversion tests, and transformers made to compute in float64."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import transformers

VOCABULARY = 61
_DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 44,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "tie_word_embeddings": False,
    "rms_norm_eps": 1e-5,
}
_RECURRENT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "state_size": 6,
    "conv_kernel": 3,
    "layer_norm_epsilon": 1e-4,
    "chunk_size": 8,
}
_TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": None}


def rope(kind: str, **fields: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 5000.0, **fields}}


# Each variant of a config, by a name that says what is special about it.
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "llama tied": ("Llama", {"tie_word_embeddings": True}),
    "llama wide heads": ("Llama", {"head_dim": 12, "num_key_value_heads": 1}),
    "llama biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "llama linear": ("Llama", rope("linear", factor=4.0)),
    "llama dynamic": ("Llama", {**rope("dynamic", factor=4.0), "max_position_embeddings": 16}),
    "llama yarn": ("Llama", rope("yarn", factor=4.0, original_max_position_embeddings=16)),
    "llama yarn fields": (
        "Llama",
        rope(
            "yarn", factor=4.0, original_max_position_embeddings=16, beta_fast=8.0, beta_slow=2.0, attention_factor=1.3
        ),
    ),
    "llama yarn mscale": (
        "Llama",
        rope("yarn", factor=4.0, original_max_position_embeddings=16, mscale=1.2, mscale_all_dim=0.7),
    ),
    "llama llama3": (
        "Llama",
        rope("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16),
    ),
    "mistral": ("Mistral", {"sliding_window": 5}),
    "mistral without window": ("Mistral", {"sliding_window": None, "head_dim": 12}),
    "qwen2": ("Qwen2", {"tie_word_embeddings": True}),
    "qwen2 sliding": ("Qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 12}),
    "qwen3 bias sliding": (
        "Qwen3",
        {
            "head_dim": 8,
            "attention_bias": True,
            "use_sliding_window": True,
            "sliding_window": 6,
            "max_window_layers": 2,
        },
    ),
    "mamba": ("Mamba", {}),
    "mamba biases": ("Mamba", {"use_bias": True, "use_conv_bias": False, "time_step_rank": 5, "expand": 1}),
    "mamba untied": ("Mamba", {"tie_word_embeddings": False, "residual_in_fp32": False}),
    "mamba2": ("Mamba2", {"num_heads": 8, "head_dim": 8, "n_groups": 2}),
    "mamba2 biases": (
        "Mamba2",
        {"num_heads": 4, "head_dim": 16, "n_groups": 4, "use_bias": True, "use_conv_bias": False},
    ),
    "mamba2 tied, limited steps": (
        "Mamba2",
        {"num_heads": 8, "head_dim": 8, "n_groups": 1, "tie_word_embeddings": True, "time_step_limit": (0.05, 0.4)},
    ),
}


def make_config(family: str, **changes: Any) -> Any:
    sizes = _RECURRENT if family.startswith("Mamba") else _DECODER
    return getattr(transformers, f"{family}Config")(**{**sizes, **_TOKENS, **changes})


def make_peer(variant: str, seed: int = 0) -> Any:
    """A model whose every weight is away from its initial zeros and ones."""
    family, changes = VARIANTS[variant]
    torch.manual_seed(seed)
    model = getattr(transformers, f"{family}ForCausalLM")(make_config(family, **changes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    return model


@contextmanager
def transformers_in_float64() -> Iterator[None]:
    """transformers casts to float32 inside: norms, rotations, scans. Here these casts are to float64."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("float32", "float"):
            patch.setattr(torch, name, torch.float64)
        patch.setattr(torch.Tensor, "float", torch.Tensor.double)
        before = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(before)
