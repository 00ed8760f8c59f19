"""Small hybrids for the tests."""

from typing import Any

import torch
from torch import Tensor, nn

from neural_layers.models.hybrid import HybridConfig, HybridForCausalLM, HybridModel

MIXED = ["mamba", "sliding_attention", "mamba2", "attention"]
PATTERNS = {
    "mixed": MIXED,
    "mamba": ["mamba"] * 2,
    "mamba2": ["mamba2"] * 2,
    "attention": ["attention"] * 2,
    "window": ["sliding_attention"] * 2,
    "samba": ["mamba", "sliding_attention"],
}


def small_config(mixers: list[str] = MIXED, **overrides: Any) -> HybridConfig:
    """Width 16, vocabulary 40, a window of 3."""
    sizes = {
        "vocab_size": 40,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": len(mixers),
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "sliding_window": 3,
        "mamba_d_state": 4,
        "mamba2_d_state": 4,
        "mamba2_head_dim": 8,
        "initializer_range": 0.3,
        "max_position_embeddings": 64,
    }
    return HybridConfig(mixers=mixers, **{**sizes, **overrides})


def small_model(mixers: list[str] = MIXED, *, seed: int = 0, **overrides: Any) -> HybridForCausalLM:
    """In float64 and evaluation mode."""
    torch.manual_seed(seed)
    return HybridForCausalLM(small_config(mixers, **overrides)).double().eval()


def tokens(*shape: int, seed: int = 0, vocabulary: int = 40) -> Tensor:
    return torch.randint(vocabulary, shape, generator=torch.Generator().manual_seed(seed))


class AsMixer(nn.Module):
    """A `HybridModel` with a mixer's face, so that the laws of mixers can be asked of it."""

    def __init__(self, model: HybridModel) -> None:
        super().__init__()
        self.model = model

    def forward(
        self,
        x: Tensor,
        *,
        cache: Any = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        seq_idx: Tensor | None = None,
    ) -> Tensor:
        if x.shape[1] == 0:  # a law may split off nothing, which a model refuses to read
            return x
        return self.model(
            inputs_embeds=x,
            past_key_values=cache,
            attention_mask=attention_mask,
            position_ids=position_ids,
            seq_idx=seq_idx,
            use_cache=cache is not None,
        ).last_hidden_state
