"""What transformers' `generate` lacks for models with recurrent state: contrastive search, streaming, chats."""

from neural_layers.models.generation.chat import ChatSession
from neural_layers.models.generation.contrastive import contrastive_generate, contrastive_search
from neural_layers.models.generation.streaming import TextStream, stream
from neural_layers.models.generation.turns import PlainTurns, TemplateTurns

__all__ = [
    "ChatSession",
    "PlainTurns",
    "TemplateTurns",
    "TextStream",
    "contrastive_generate",
    "contrastive_search",
    "stream",
]
