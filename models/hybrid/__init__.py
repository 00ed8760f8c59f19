"""The hybrid language model: a decoder whose layers mix by Mamba, Mamba-2, attention or windowed attention."""

from neural_layers.errors import require

require("transformers", extra="models")

# ruff: noqa: E402  (the imports below need it)
import neural_layers.models.quantized  # noqa: F401  (so that its quantized folders load)
from neural_layers.models.hybrid.cache import HybridCache
from neural_layers.models.hybrid.causal_lm import HybridForCausalLM
from neural_layers.models.hybrid.classification import HybridForSequenceClassification
from neural_layers.models.hybrid.config import HybridConfig
from neural_layers.models.hybrid.modeling import HybridModel, HybridPreTrainedModel
from neural_layers.models.hybrid.patterns import attention_every, pure, samba

__all__ = [
    "HybridCache",
    "HybridConfig",
    "HybridForCausalLM",
    "HybridForSequenceClassification",
    "HybridModel",
    "HybridPreTrainedModel",
    "attention_every",
    "pure",
    "samba",
]
