"""The configuration of the hybrid model."""

from typing import Any

from transformers import AutoConfig, PreTrainedConfig

from neural_layers.models.hybrid.patterns import attention_every, check_mixers, check_options
from neural_layers.models.rotary import SharedRotary

_LAYER_TYPES = {
    "mamba": "linear_attention",
    "mamba2": "linear_attention",
    "attention": "full_attention",
    "sliding_attention": "sliding_attention",
}
POOLINGS = ("last", "mean", "attention", "gem")
_PRESETS: dict[str, dict[str, Any]] = {
    "tiny": {
        "vocab_size": 256,
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
    "slm-20m": {
        "vocab_size": 8192,
        "hidden_size": 384,
        "intermediate_size": 1024,
        "num_hidden_layers": 8,
        "num_attention_heads": 6,
        "num_key_value_heads": 2,
    },
    "slm-130m": {
        "vocab_size": 32000,
        "hidden_size": 768,
        "intermediate_size": 2560,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
        "num_key_value_heads": 4,
    },
}


class HybridConfig(PreTrainedConfig):
    """Sizes and switches of the hybrid models; field names are those of transformers where it has them.

    mixers:              the mixer of each layer: "mamba", "mamba2", "attention", "sliding_attention" (see `patterns`);
                         by default every fourth is attention and the others Mamba. `layer_types` follows from it.
    hidden_size: D. num_key_value_heads: G, by default as many as num_attention_heads. head_dim: K, by default D / H.
    intermediate_size:   F of SwiGLU; 0 for layers without a feed-forward part (as in Mamba's own models)
    sliding_window:      the window of "sliding_attention": a token sees itself and the sliding_window − 1 before it
    position_embedding:  "rope", "alibi" or None (order is then known to the recurrences alone), for all attention
    rope_parameters:     `rope_theta` and, for a scaling, `rope_type` and its fields, as `RotaryEmbedding` takes them
    max_position_embeddings: the longest context, in tokens
    qk_norm, attention_bias (of q, k and v), attention_output_bias: of all attention layers
    mlp_bias:            of SwiGLU's projections
    mamba_d_state, mamba_d_conv, mamba_expand, mamba_inner_size (E, where it is not mamba_expand · D), mamba_dt_rank,
    mamba_bias (of in_proj and out_proj), mamba_conv_bias: of the mixer "mamba"
    mamba2_d_state, mamba2_d_conv, mamba2_expand, mamba2_head_dim, mamba2_n_groups, mamba2_bias, mamba2_conv_bias,
    mamba2_norm_eps, mamba2_step_limit (the lowest and highest Δ; None for no limit): of the mixer "mamba2"
    mamba2_layers:       where layers differ: the index of a "mamba2" layer, as a string, to arguments of `Mamba2` that
                         replace those of the fields above; `rotary` is True or False there (see `check_options`)
    dropout:             on embeddings and on each branch's output; attention_dropout: on attention probabilities
    classifier_pooling:  "last", "mean", "attention" or "gem"; classifier_dropout: before the last layer of the head

    Raises ValueError for mixers and sizes that do not fit, and for what is unknown.
    """

    model_type = "neural_hybrid"
    keys_to_ignore_at_inference = ["past_key_values"]

    vocab_size: int = 32000
    hidden_size: int = 512
    intermediate_size: int = 1408
    num_hidden_layers: int = 8
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    mixers: list[str] | None = None
    layer_types: list[str] | None = None
    sliding_window: int = 1024
    position_embedding: str | None = "rope"
    rope_parameters: dict[str, Any] | None = None
    max_position_embeddings: int = 4096
    qk_norm: bool = False
    attention_bias: bool = False
    attention_output_bias: bool = False
    mlp_bias: bool = False
    mamba_d_state: int = 16
    mamba_d_conv: int = 4
    mamba_expand: int = 2
    mamba_inner_size: int | None = None
    mamba_dt_rank: int | None = None
    mamba_bias: bool = False
    mamba_conv_bias: bool = True
    mamba2_d_state: int = 64
    mamba2_d_conv: int = 4
    mamba2_expand: int = 2
    mamba2_head_dim: int = 64
    mamba2_n_groups: int = 1
    mamba2_bias: bool = False
    mamba2_conv_bias: bool = True
    mamba2_norm_eps: float = 1e-5
    mamba2_step_limit: list[float] | None = None
    mamba2_layers: dict[str, dict[str, Any]] | None = None
    rms_norm_eps: float = 1e-6
    dropout: float = 0.0
    attention_dropout: float = 0.0
    initializer_range: float = 0.02
    classifier_pooling: str = "last"
    classifier_dropout: float = 0.1
    use_cache: bool = True
    tie_word_embeddings: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        if self.mixers is None:
            self.mixers = attention_every(self.num_hidden_layers)
        check_mixers(self.mixers, self.num_hidden_layers)
        check_options(self.mamba2_layers or {}, self.mixers)
        self.layer_types = [_LAYER_TYPES[name] for name in self.mixers]
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.rope_parameters is None:
            self.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}
        self._check_sizes()
        self._check_attention()
        super().__post_init__(**kwargs)

    @classmethod
    def preset(cls, name: str, **overrides: Any) -> "HybridConfig":
        """The sizes called `name`, with `overrides`: "tiny" (0.8 M parameters), "slm-20m" (19 M), "slm-130m".

        Every fourth layer is attention, as by default. Raises ValueError for an unknown name.
        """
        if name not in _PRESETS:
            raise ValueError(f"there is no preset {name!r}; there are {', '.join(_PRESETS)}")
        return cls(**{**_PRESETS[name], **overrides})

    def rotary(self) -> SharedRotary | None:
        """The rotary embedding that all attention layers share; None without RoPE."""
        return self.rotary_of(self.rope_parameters)

    def rotary_of(self, rope_parameters: dict[str, Any] | None) -> SharedRotary | None:
        """`rotary` with other parameters than the config's own; raises ValueError where they are wrong."""
        if self.position_embedding != "rope":
            return None
        scaling = dict(rope_parameters or {})
        base = scaling.pop("rope_theta", 10000.0)
        is_plain = scaling.get("rope_type", "default") == "default"
        return SharedRotary(self.attention_head_dim, base, None if is_plain else scaling)

    @property
    def attention_head_dim(self) -> int:
        """K, whether or not `head_dim` is given."""
        return self.head_dim or self.hidden_size // self.num_attention_heads

    def _check_sizes(self) -> None:
        positive = (
            "vocab_size hidden_size num_hidden_layers num_attention_heads num_key_value_heads sliding_window "
            "max_position_embeddings mamba_d_state mamba_d_conv mamba_expand mamba2_d_state mamba2_d_conv "
            "mamba2_expand mamba2_head_dim mamba2_n_groups"
        )
        for name in positive.split():
            if not isinstance(getattr(self, name), int) or getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)!r} must be a positive integer")
        if self.mamba_inner_size is not None and self.mamba_inner_size < 1:
            raise ValueError(f"mamba_inner_size={self.mamba_inner_size} must be at least 1, or None for the usual size")
        if self.intermediate_size < 0:
            raise ValueError(f"intermediate_size={self.intermediate_size} must not be negative; 0 leaves it out")
        for name in ("dropout", "attention_dropout", "classifier_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie in [0, 1)")
        if self.classifier_pooling not in POOLINGS:
            raise ValueError(f"classifier_pooling={self.classifier_pooling!r} must be one of {', '.join(POOLINGS)}")

    def _check_attention(self) -> None:
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads or 1
        if self.head_dim is None and self.hidden_size % heads:
            raise ValueError(
                f"hidden_size={self.hidden_size} must be a multiple of num_attention_heads={heads}, or head_dim given"
            )
        if heads % kv_heads:
            raise ValueError(f"num_attention_heads={heads} must be a multiple of num_key_value_heads={kv_heads}")
        if self.position_embedding not in ("rope", "alibi", None):
            raise ValueError(f"position_embedding={self.position_embedding!r} must be 'rope', 'alibi' or None")
        self.rotary()  # checks rope_parameters


AutoConfig.register("neural_hybrid", HybridConfig)
