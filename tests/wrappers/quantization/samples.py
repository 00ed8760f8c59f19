"""Small models that are quantized in the tests."""

from typing import Any

import torch
from torch import Tensor, nn

from neural_layers.wrappers.quantization import quantize
from tests.models.hybrids import small_config, tokens

SCHEMES = ("float16", "bfloat16", "int8_dynamic", "int8_static", "int4", "nf4", "fp4")


class Tower(nn.Module):
    """A user's model: a table, a tied head, a layer that stands twice, and torch's own attention."""

    def __init__(self, width: int = 64, vocabulary: int = 40) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width, padding_idx=0)
        self.first = nn.Sequential(nn.Linear(width, 96), nn.GELU(), nn.Linear(96, width))
        self.again = self.first
        self.attention = nn.MultiheadAttention(width, 4, batch_first=True)
        self.conv = nn.Conv1d(width, width, 3, padding=1)
        self.head = nn.Linear(width, vocabulary, bias=True)
        self.head.weight = self.embed.weight

    def forward(self, ids: Tensor) -> Tensor:
        x = self.again(self.first(self.embed(ids)))
        x = x + self.attention(x, x, x, need_weights=False)[0]
        return self.head(x + self.conv(x.transpose(1, 2)).transpose(1, 2))


def tower(seed: int = 0, **sizes: int) -> Tower:
    torch.manual_seed(seed)
    return Tower(**sizes).eval()


def hybrid(**overrides: Any) -> Any:
    """A Mamba layer and one of attention, width 64, tied, in float32."""
    from neural_layers.models.hybrid import HybridForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "tie_word_embeddings": True}
    return HybridForCausalLM(small_config(["mamba", "attention"], **{**sizes, **overrides})).eval()


def cvm() -> Any:
    """One layer each, width 64, tied."""
    from neural_layers.models.cvm import CVMConfig, CVMForConditionalGeneration

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 1, "num_attention_heads": 4}
    return CVMForConditionalGeneration(CVMConfig(vocab_size=40, initializer_range=0.2, **sizes)).eval()


def llama(*, tied: bool = False) -> Any:
    """transformers' own, one layer, width 64."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 4}
    config = LlamaConfig(
        vocab_size=40,
        num_key_value_heads=2,
        initializer_range=0.2,
        tie_word_embeddings=tied,
        attention_bias=True,
        **sizes,
    )
    return LlamaForCausalLM(config).eval()


def inputs(model: nn.Module) -> dict[str, Tensor]:
    """What the sample reads: two rows."""
    names = {"Tower": ("ids",), "CVMForConditionalGeneration": ("input_ids", "decoder_input_ids")}
    return {name: tokens(2, 7, seed=i) for i, name in enumerate(names.get(type(model).__name__, ("input_ids",)))}


def outputs(model: nn.Module) -> Tensor:
    """The logits of `inputs`, in evaluation mode."""
    with torch.no_grad():
        out = model(**inputs(model))
    return out if isinstance(out, Tensor) else out.logits


def quantized(model: Any, scheme: str, **arguments: Any) -> Any:
    """The model itself, quantized; int8_static is calibrated with what `outputs` runs."""
    if scheme == "int8_static":
        arguments["calibration"] = [inputs(model)]
    quantize(model, scheme, **arguments)
    return model
