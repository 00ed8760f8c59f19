"""What transformers' `generate` lacks for models with recurrent state: contrastive search, streaming, chats."""

from neural_layers.models.generation.contrastive import contrastive_generate, contrastive_search
from neural_layers.models.generation.streaming import TextStream, stream

__all__ = ["TextStream", "contrastive_generate", "contrastive_search", "stream"]
