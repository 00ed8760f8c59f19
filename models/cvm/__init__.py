"""CVM: the Count-Vector-Merge translator."""

from neural_layers.errors import require

require("transformers", extra="models")

# ruff: noqa: E402  (the imports below need it)
from neural_layers.models.cvm.config import CVMConfig
from neural_layers.models.cvm.modeling import CVMForConditionalGeneration

__all__ = ["CVMConfig", "CVMForConditionalGeneration"]
