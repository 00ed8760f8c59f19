"""Transformer blocks that are correct and fast everywhere: on a CPU, on a GPU, in float64, in ONNX Runtime."""

from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent
if (_ROOT / "pyproject.toml").is_file() and (_ROOT / "kernels").is_dir():
    # In a checkout `neural_layers.kernels`, `.models`, … are the folders beside this one; see setup.py.
    __path__.append(str(_ROOT))

# ruff: noqa: E402  (the imports below need the path above)
from neural_layers import functional
from neural_layers._version import __version__
from neural_layers.attention import FlashAttention, GroupedQueryAttention
from neural_layers.block import EnhancedBlock
from neural_layers.cache import LayerCache
from neural_layers.cross_attention import CrossAttention
from neural_layers.feed_forward import GeGLU, SwiGLU
from neural_layers.kernels.dispatch import BackendError, SlowBackendWarning, explain, use_backend
from neural_layers.linear import Linear
from neural_layers.linear_4bit import Linear4bit
from neural_layers.linear_int4 import LinearInt4
from neural_layers.linear_int8 import LinearInt8
from neural_layers.mamba import Mamba
from neural_layers.mamba2 import Mamba2
from neural_layers.norm import RMSNorm
from neural_layers.pooling import AttentionPooling, GeMPooling
from neural_layers.position import RotaryEmbedding, alibi_slopes
from neural_layers.quantized_embedding import Embedding4bit, EmbeddingInt4, EmbeddingInt8
from neural_layers.residual import LayerScale, PostNormResidual, PreNormResidual, StochasticDepth

__all__ = [
    "AttentionPooling",
    "BackendError",
    "CrossAttention",
    "Embedding4bit",
    "EmbeddingInt4",
    "EmbeddingInt8",
    "EnhancedBlock",
    "FlashAttention",
    "GeGLU",
    "GeMPooling",
    "GroupedQueryAttention",
    "LayerCache",
    "LayerScale",
    "Linear",
    "Linear4bit",
    "LinearInt4",
    "LinearInt8",
    "Mamba",
    "Mamba2",
    "PostNormResidual",
    "PreNormResidual",
    "RMSNorm",
    "RotaryEmbedding",
    "SlowBackendWarning",
    "StochasticDepth",
    "SwiGLU",
    "__version__",
    "alibi_slopes",
    "explain",
    "functional",
    "use_backend",
]
