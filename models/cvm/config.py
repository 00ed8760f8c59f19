"""The configuration of CVM."""

from typing import Any

from transformers import AutoConfig, PreTrainedConfig


class CVMConfig(PreTrainedConfig):
    """Sizes and switches of a `CVMForConditionalGeneration`; field names are those of transformers.

    hidden_size: D. num_hidden_layers: of the encoder and of the decoder, each, unless `num_decoder_layers` is given.
    num_key_value_heads: by default as many as num_attention_heads. head_dim: K, by default D / H.
    intermediate_size: F of SwiGLU.
    max_position_embeddings: the longest source or target, in tokens. dropout: on embeddings and on each branch's
    output; attention_dropout: on attention probabilities. count_vector_merge: whether the count vector is merged
    (False is the ablation).

    Raises ValueError for head counts that do not fit and for probabilities outside [0, 1).
    """

    model_type = "cvm"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 32000
    hidden_size: int = 512
    intermediate_size: int = 2048
    num_hidden_layers: int = 6
    num_decoder_layers: int | None = None
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    max_position_embeddings: int = 512
    dropout: float = 0.1
    attention_dropout: float = 0.0
    rope_theta: float = 10000.0
    rms_norm_eps: float = 1e-6
    initializer_range: float = 0.02
    count_vector_merge: bool = True
    use_cache: bool = True
    is_encoder_decoder: bool = True
    tie_word_embeddings: bool = True
    pad_token_id: int = 0
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    decoder_start_token_id: int = 1

    def __post_init__(self, **kwargs: Any) -> None:
        if self.num_decoder_layers is None:
            self.num_decoder_layers = self.num_hidden_layers
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        for name in ("vocab_size", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads"):
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)!r} must be a positive integer")
        if self.head_dim is None and self.hidden_size % heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} must be a multiple of num_attention_heads={heads}, or head_dim given"
            )
        if heads % kv_heads:
            raise ValueError(f"num_attention_heads={heads} must be a multiple of num_key_value_heads={kv_heads}")
        for name in ("dropout", "attention_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie in [0, 1)")
        super().__post_init__(**kwargs)

    @property
    def attention_head_dim(self) -> int:
        """K, whether or not `head_dim` is given."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    @classmethod
    def teacher(cls, **overrides: Any) -> "CVMConfig":
        """Vocabulary 32,000, width 768, 12 heads, 12 layers, feed-forward 3072."""
        sizes = {"hidden_size": 768, "num_attention_heads": 12, "num_hidden_layers": 12, "intermediate_size": 3072}
        return cls(**{"vocab_size": 32000, **sizes, **overrides})

    @classmethod
    def student(cls, **overrides: Any) -> "CVMConfig":
        """Vocabulary 32,000, width 512, 8 heads, 6 layers, feed-forward 2048."""
        sizes = {"hidden_size": 512, "num_attention_heads": 8, "num_hidden_layers": 6, "intermediate_size": 2048}
        return cls(**{"vocab_size": 32000, **sizes, **overrides})


AutoConfig.register("cvm", CVMConfig)
