"""Small models and adapters that are no longer at their beginning."""

import torch
from torch import Tensor, nn

from neural_layers.models.hybrid import HybridConfig, HybridForCausalLM
from neural_layers.wrappers.lora import LoRAConfig, apply_lora
from neural_layers.wrappers.lora.report import CoverageReport

VOCABULARY = 23
# Every projection of both mixers, of attention and of the feed-forward; the convolution has 4 taps.
EVERYTHING = ("re:.*_proj", "conv1d", "embed_tokens", "lm_head")


def hybrid(*, tie: bool = False, dtype: torch.dtype = torch.float64, **fields) -> HybridForCausalLM:
    """A Mamba, a Mamba-2 and an attention layer, in `eval`."""
    torch.manual_seed(0)
    sizes = {
        "vocab_size": VOCABULARY,
        "hidden_size": 16,
        "intermediate_size": 24,
        "num_hidden_layers": 3,
        "mixers": ["mamba", "mamba2", "attention"],
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "mamba_d_state": 4,
        "mamba_dt_rank": 4,
        "mamba2_d_state": 6,
        "mamba2_head_dim": 8,
        "tie_word_embeddings": tie,
    }
    return HybridForCausalLM(HybridConfig(**{**sizes, **fields})).to(dtype).eval()


def tokens(rows: int = 3, length: int = 7, seed: int = 0) -> Tensor:
    """Ids (rows, length)."""
    return torch.randint(0, VOCABULARY, (rows, length), generator=torch.Generator().manual_seed(seed))


def shake(model: nn.Module, name: str, scale: float = 0.1, seed: int = 1) -> None:
    """Move an adapter away from its beginning, where B·A = 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if f"adapters.{name}." in key:
                noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
                parameter.add_(scale * noise.to(parameter.dtype))


def trained(model: nn.Module, config: LoRAConfig, name: str = "default", seed: int = 1) -> CoverageReport:
    """Apply an adapter and shake it."""
    report = apply_lora(model, config, name)
    shake(model, name, seed=seed)
    return report


def everywhere(r: int = 3, **fields) -> LoRAConfig:
    """An adapter of everything that takes one."""
    return LoRAConfig(r=r, alpha=2 * r, target_modules=EVERYTHING, **fields)
