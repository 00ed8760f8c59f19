"""Weights of others: models of transformers as hybrid models, and attention layers turned into Mamba-2 layers."""

from neural_layers.models.conversion.loading import from_transformers
from neural_layers.models.conversion.replacing import convert_to_hybrid

__all__ = ["convert_to_hybrid", "from_transformers"]
