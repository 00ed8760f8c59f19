"""CVM: the Count-Vector-Merge translator."""

from neural_layers.errors import require

require("transformers", extra="models")

# ruff: noqa: E402  (the imports below need it)
import neural_layers.models.quantized  # noqa: F401  (so that its quantized folders load)
from neural_layers.models.cvm.config import CVMConfig
from neural_layers.models.cvm.modeling import CVMForConditionalGeneration

__all__ = ["CVMConfig", "CVMForConditionalGeneration"]
