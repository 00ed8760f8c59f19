"""What transformers' `generate` lacks for models with recurrent state: contrastive search, streaming, chats."""

from neural_layers.models.generation.contrastive import contrastive_generate, contrastive_search

__all__ = ["contrastive_generate", "contrastive_search"]
