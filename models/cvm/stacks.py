"""The encoder and the decoder of CVM: stacks of `EnhancedBlock`s.

Letters: B batch, T target length, S source length, D width.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import BaseModelOutput, BaseModelOutputWithPastAndCrossAttentions

from neural_layers.attention import GroupedQueryAttention
from neural_layers.block import EnhancedBlock
from neural_layers.cross_attention import CrossAttention
from neural_layers.feed_forward import SwiGLU
from neural_layers.models.caches import cache_layer
from neural_layers.models.cvm.config import CVMConfig
from neural_layers.models.cvm.count_vector import CountVectorMerge
from neural_layers.models.rotary import SharedRotary
from neural_layers.norm import RMSNorm


def refuse_attentions(output_attentions: bool | None) -> None:
    """Raise ValueError where attention probabilities are asked for: they are never built."""
    if output_attentions:
        raise ValueError("output_attentions=True: attention probabilities are never built here; leave it out")


def hiding(mask: Tensor | None) -> Tensor | None:
    """The mask as booleans, or None where it hides nothing: every layer would read it. On the CPU alone, where looking
    costs nothing; a graph cannot look, and a GPU would have to wait."""
    if mask is None:
        return None
    mask = mask.bool()
    can_look = mask.device.type == "cpu" and not torch.compiler.is_compiling()
    return None if can_look and bool(mask.all()) else mask


def build_block(config: CVMConfig, rotary: SharedRotary, *, is_decoder: bool) -> EnhancedBlock:
    """Pre-norm: attention (causal in the decoder, then attention to the source), SwiGLU. Blocks share `rotary`."""
    heads = (config.num_attention_heads, config.num_key_value_heads, config.attention_head_dim)
    sizes = (config.hidden_size, *heads)
    mixer = GroupedQueryAttention(
        *sizes,
        position=rotary,
        causal=is_decoder,
        dropout=config.attention_dropout,
    )
    return EnhancedBlock(
        config.hidden_size,
        mixer=mixer,
        cross_attention=CrossAttention(*sizes, dropout=config.attention_dropout) if is_decoder else None,
        feed_forward=SwiGLU(config.hidden_size, config.intermediate_size),
        dropout=config.dropout,
        norm_eps=config.rms_norm_eps,
    )


class _Stack(nn.Module):
    """Embedding, blocks and last norm, which encoder and decoder share."""

    def __init__(self, config: CVMConfig, embed_tokens: nn.Module, num_layers: int, *, is_decoder: bool) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = embed_tokens
        self.dropout = nn.Dropout(config.dropout)
        self.rotary = SharedRotary(config.attention_head_dim, config.rope_theta)
        self.layers = nn.ModuleList(build_block(config, self.rotary, is_decoder=is_decoder) for _ in range(num_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        # Replaced by transformers where checkpointing is turned on.
        self._gradient_checkpointing_func: Callable[..., Tensor] = checkpoint

    def embed(self, input_ids: Tensor, past: int = 0) -> Tensor:
        length, limit = past + input_ids.shape[1], self.config.max_position_embeddings
        if length > limit:
            raise ValueError(f"{length} tokens are more than max_position_embeddings={limit}")
        self._check_ids(input_ids)
        # √D, as in "Attention Is All You Need": a tied embedding is small, because it is also the output layer.
        return self.embed_tokens(input_ids) * self.config.hidden_size**0.5

    def _check_ids(self, input_ids: Tensor) -> None:
        # On the CPU alone, where looking costs nothing; a graph cannot look, and a GPU would have to wait.
        if torch.compiler.is_compiling() or input_ids.device.type != "cpu" or not input_ids.numel():
            return
        low, high = (int(bound) for bound in input_ids.aminmax())
        if low < 0 or high >= self.config.vocab_size:
            wrong = low if low < 0 else high
            raise ValueError(f"token id {wrong} lies outside the vocabulary of {self.config.vocab_size}")

    def run(
        self, x: Tensor, *, collect: bool, past: int = 0, per_layer: Any = None, **shared: Any
    ) -> tuple[Tensor, Any]:
        """All blocks and the norm; the states before each block and after the norm where `collect`."""
        states: list[Tensor] = []
        shared["position_ids"] = torch.arange(past, past + x.shape[1], device=x.device)
        for i, layer in enumerate(self.layers):
            if collect:
                states.append(x)
            own = per_layer(i) if per_layer else {}
            if self.gradient_checkpointing and self.training:
                x = self._gradient_checkpointing_func(layer.__call__, x, **own, **shared)
            else:
                x = layer(x, **own, **shared)
        self.rotary.forget()
        x = self.norm(x)
        return x, (*states, x) if collect else None


class CVMEncoder(_Stack):
    """Tokens of the source → states (B, S, D), with the count vector merged in where the config says so."""

    main_input_name = "input_ids"

    def __init__(self, config: CVMConfig, embed_tokens: nn.Module) -> None:
        super().__init__(config, embed_tokens, config.num_hidden_layers, is_decoder=False)
        self.merge = CountVectorMerge(config.hidden_size, config.rms_norm_eps) if config.count_vector_merge else None

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        output_attentions: bool | None = False,
        output_hidden_states: bool | None = False,
        return_dict: bool = True,
    ) -> BaseModelOutput | tuple[Any, ...]:
        refuse_attentions(output_attentions)
        if attention_mask is None:
            attention_mask = torch.ones_like(input_ids)
        embedded = self.embed(input_ids)
        x, states = self.run(self.dropout(embedded), collect=bool(output_hidden_states), attention_mask=attention_mask)
        if self.merge is not None:
            x = self.merge(x, embedded, input_ids, attention_mask, self.config.vocab_size)
        output = BaseModelOutput(last_hidden_state=x, hidden_states=states)
        return output if return_dict else output.to_tuple()


class CVMDecoder(_Stack):
    """Tokens of the target and states of the source → states (B, T, D)."""

    def __init__(self, config: CVMConfig, embed_tokens: nn.Module) -> None:
        super().__init__(config, embed_tokens, config.num_decoder_layers or 0, is_decoder=True)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        encoder_hidden_states: Tensor | None = None,
        encoder_attention_mask: Tensor | None = None,
        past_key_values: Any = None,
        output_hidden_states: bool = False,
    ) -> BaseModelOutputWithPastAndCrossAttentions:
        if past_key_values is not None and self.gradient_checkpointing and self.training:
            raise ValueError("gradient checkpointing would fill the cache twice; train with use_cache=False")
        past = 0 if past_key_values is None else past_key_values.get_seq_length()

        def caches(i: int) -> dict[str, Any]:
            if past_key_values is None:
                return {}
            return {
                "cache": cache_layer(past_key_values.self_attention_cache, i),
                "cross_cache": cache_layer(past_key_values.cross_attention_cache, i),
            }

        x, states = self.run(
            self.dropout(self.embed(input_ids, past)),
            collect=output_hidden_states,
            past=past,
            per_layer=caches,
            attention_mask=attention_mask,
            context=encoder_hidden_states,
            context_mask=hiding(encoder_attention_mask),
        )
        if past_key_values is not None:
            past_key_values.is_updated = dict.fromkeys(range(len(self.layers)), True)
        return BaseModelOutputWithPastAndCrossAttentions(
            last_hidden_state=x, past_key_values=past_key_values, hidden_states=states
        )
