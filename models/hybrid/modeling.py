"""The decoder: embeddings, a block for each mixer, the last norm.

Letters: B batch, T length, P tokens in the cache, D width.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModel, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutputWithPast

from neural_layers.block import EnhancedBlock
from neural_layers.models.caches import cache_layer
from neural_layers.models.hybrid.cache import HybridCache
from neural_layers.models.hybrid.config import HybridConfig
from neural_layers.models.hybrid.inputs import check_input, covering_mask, documents, tokens_seen
from neural_layers.models.hybrid.layers import build_block
from neural_layers.norm import RMSNorm
from neural_layers.pooling import AttentionPooling, GeMPooling


class HybridPreTrainedModel(PreTrainedModel):
    """What the hybrid models share: their config, how weights are initialised, what transformers may do with them."""

    config: HybridConfig
    config_class = HybridConfig
    base_model_prefix = "model"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["EnhancedBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    # Recurrent layers go back by snapshot and replay (see `HybridCache`), so assisted decoding is allowed.
    _is_stateful = False

    def _initialize_weights(self, module: nn.Module, is_custom_code: bool = False) -> None:
        # For code outside of it transformers passes over modules whose own parameters are loaded, or that have none.
        # `_init_weights` here respects what is loaded, parameter by parameter, and wants to see every module.
        super()._initialize_weights(module, False)

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, nn.Conv1d):
            # transformers' normal of `initializer_range` would all but close a depthwise filter of four taps.
            bound = (module.in_channels / module.groups * module.kernel_size[0]) ** -0.5
            init.uniform_(module.weight, -bound, bound)
        if isinstance(module, AttentionPooling):
            init.normal_(module.query, std=module.query.shape[-1] ** -0.5)
        if isinstance(module, GeMPooling):
            init.constant_(module.p, 3.0)
        if isinstance(module, EnhancedBlock):
            # The last projection of each branch, smaller by the number of branches (GPT-2): the residual stream then
            # keeps its size whatever the depth.
            std = self.config.initializer_range / (2 * self.config.num_hidden_layers) ** 0.5
            for name, parameter in module.named_parameters():
                if name.endswith(("o_proj.weight", "out_proj.weight", "down_proj.weight")):
                    init.normal_(parameter, mean=0.0, std=std)
        if hasattr(module, "reset_recurrence"):
            _reset_recurrence(module)


@torch.no_grad()
def _reset_recurrence(mixer: Any) -> None:
    """Initialise A, D and Δ as the mixer does, but for what a checkpoint has already filled."""
    loaded = {p: p.clone() for p in mixer.parameters() if getattr(p, "_is_hf_initialized", False)}
    mixer.reset_recurrence()
    for parameter, value in loaded.items():
        parameter.copy_(value)


class HybridModel(HybridPreTrainedModel):
    """Tokens → states (B, T, D).

    forward(input_ids (B, T) or inputs_embeds (B, T, D), …) → `BaseModelOutputWithPast`, with
      attention_mask:  (B, P + T), nonzero for a token that counts; padding on the left changes nothing
      position_ids:    (B, T) or (1, T), by default P … P + T − 1; without a cache and without padding, a position that
                       is not larger than the one before it begins a new document
      seq_idx:         (B, P + T), the document of each token (runs of equal ids), instead of restarting positions
      past_key_values: a `HybridCache`, or transformers' `DynamicCache(config=…)`; made by `use_cache=True`

    Documents in one row do not see each other: neither attention nor convolution nor recurrence crosses a border.
    Raises ValueError for empty input, ids outside the vocabulary, more tokens than `max_position_embeddings`, masks
    that do not fit, and a cache of another model or batch.
    """

    def __init__(self, config: HybridConfig) -> None:
        super().__init__(config)
        self.embed_tokens: nn.Module = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.dropout = nn.Dropout(config.dropout)
        self.rotary = config.rotary()
        self.layers = nn.ModuleList(build_block(config, i, self.rotary) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        # Replaced by transformers where checkpointing is turned on.
        self._gradient_checkpointing_func: Callable[..., Tensor] = checkpoint
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embed_tokens = value

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        seq_idx: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool = True,
    ) -> BaseModelOutputWithPast | tuple[Any, ...]:
        if output_attentions:
            raise ValueError("output_attentions=True: attention probabilities are never built here; leave it out")
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        cache = self._cache(past_key_values, use_cache)
        past = tokens_seen(cache)
        check_input(self.config, input_ids if inputs_embeds is None else inputs_embeds, past, cache)
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        attention_mask = covering_mask(attention_mask, inputs_embeds, past)
        seq_idx = documents(seq_idx, position_ids, attention_mask, inputs_embeds, past)
        if position_ids is None:
            length = inputs_embeds.shape[1]
            position_ids = torch.arange(past, past + length, device=inputs_embeds.device).unsqueeze(0)
        x, length = inputs_embeds, inputs_embeds.shape[1]
        if isinstance(cache, HybridCache):
            x, position_ids = cache.admit(x, position_ids)
        if position_ids.shape[0] == 1:
            position_ids = position_ids[0]  # one tensor for all layers, whose rotary tables are then made once

        masks = {"attention_mask": attention_mask, "position_ids": position_ids, "seq_idx": seq_idx}
        x, states = self._run(self.dropout(x), cache, bool(output_hidden_states), masks)
        # A cropped cache reads the tokens it kept again: their outputs were given before.
        output = BaseModelOutputWithPast(
            last_hidden_state=x[:, x.shape[1] - length :],
            past_key_values=cache,
            hidden_states=tuple(s[:, s.shape[1] - length :] for s in states) if output_hidden_states else None,
        )
        return output if return_dict else output.to_tuple()

    def _run(
        self, x: Tensor, cache: Any, collect: bool, masks: dict[str, Tensor | None]
    ) -> tuple[Tensor, list[Tensor]]:
        """All blocks and the norm; the states before each block and after the norm where `collect`."""
        states: list[Tensor] = []
        for i, layer in enumerate(self.layers):
            if collect:
                states.append(x)
            if self.gradient_checkpointing and self.training:
                x = self._gradient_checkpointing_func(layer.__call__, x, **masks)
            else:
                x = layer(x, cache=cache_layer(cache, i), **masks)
        x = self.norm(x)
        if self.rotary is not None:
            self.rotary.forget()
        return x, [*states, x] if collect else []

    def _cache(self, given: Any, use_cache: bool | None) -> Any:
        recomputes = self.gradient_checkpointing and self.training
        if given is not None and recomputes:
            raise ValueError("gradient checkpointing would fill the cache twice; train with use_cache=False")
        wanted = (self.config.use_cache and not self.training) if use_cache is None else use_cache and not recomputes
        return HybridCache(self.config) if wanted and given is None else given


AutoModel.register(HybridConfig, HybridModel)
