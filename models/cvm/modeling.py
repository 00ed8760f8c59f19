"""CVM: an encoder-decoder translator of `EnhancedBlock`s with Count-Vector-Merge.

Letters: B batch, T target length, S source length, D width, V vocabulary.
"""

from typing import Any

import torch
import torch.nn.functional
from torch import Tensor, nn
from transformers import (
    AutoModelForSeq2SeqLM,
    DynamicCache,
    EncoderDecoderCache,
    GenerationMixin,
    PreTrainedModel,
)
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput, Seq2SeqLMOutput

from neural_layers.linear import Linear
from neural_layers.models.cvm.config import CVMConfig
from neural_layers.models.cvm.count_vector import CountVectorMerge
from neural_layers.models.cvm.stacks import CVMDecoder, CVMEncoder, refuse_attentions


class CVMForConditionalGeneration(PreTrainedModel, GenerationMixin):
    """Translate: encoder states of the source, decoder over the target, tied embeddings.

    forward(input_ids (B, S), attention_mask (B, S), decoder_input_ids (B, T) or labels (B, T), …) → `Seq2SeqLMOutput`
      labels:          the target with −100 where it does not count; `decoder_input_ids` are made of it by shifting
                       right. `loss` is the mean cross-entropy over the labels, or their sum over
                       `num_items_in_batch` where that is given (gradient accumulation).
      past_key_values: an `EncoderDecoderCache`; made by `use_cache=True`.
      skip_logits:     leave the logits out, for a loss that makes them of the last hidden state, a few at a time.

    `generate` decodes greedily or by beams with the cache. Raises ValueError for a source or target longer than
    `max_position_embeddings`, and where neither labels nor decoder inputs are given.
    """

    config_class = CVMConfig
    base_model_prefix = ""
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["EnhancedBlock"]
    _tied_weights_keys = {
        "encoder.embed_tokens.weight": "shared.weight",
        "decoder.embed_tokens.weight": "shared.weight",
        "lm_head.weight": "shared.weight",
    }
    accepts_loss_kwargs = True

    def __init__(self, config: CVMConfig) -> None:
        super().__init__(config)
        if config.tie_word_embeddings:
            # Trainer asks for these when it loads its best checkpoint: they are missing there because they are tied.
            self._keys_to_ignore_on_save = list(self._tied_weights_keys)
        self.shared: nn.Module = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.encoder = CVMEncoder(config, self.shared)
        self.decoder = CVMDecoder(config, self.shared)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, CountVectorMerge):
            init.zeros_(module.gate)

    def get_input_embeddings(self) -> nn.Module:
        return self.shared

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.shared = self.encoder.embed_tokens = self.decoder.embed_tokens = value

    def get_encoder(self, modality: str | None = None) -> nn.Module:
        return self.encoder

    def get_decoder(self) -> nn.Module:
        return self.decoder

    def _prepare_cache_for_generation(self: Any, *args: Any, **kwargs: Any) -> Any:
        generation_config, model_kwargs = args[:2]
        # transformers would make as many layers as the encoder has; lazy caches make those that the decoder asks for.
        is_default = generation_config.use_cache is not False and generation_config.cache_implementation is None
        if is_default and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = EncoderDecoderCache(DynamicCache(), DynamicCache())
        return GenerationMixin._prepare_cache_for_generation(self, *args, **kwargs)

    def prepare_inputs_for_generation(self: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        # Where there are stop strings, transformers hands the tokenizer on to the model as well.
        kwargs.pop("tokenizer", None)
        return GenerationMixin.prepare_inputs_for_generation(self, *args, **kwargs)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        decoder_input_ids: Tensor | None = None,
        decoder_attention_mask: Tensor | None = None,
        encoder_outputs: Any = None,
        past_key_values: EncoderDecoderCache | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = False,
        output_attentions: bool | None = False,
        output_hidden_states: bool | None = False,
        num_items_in_batch: Tensor | int | None = None,
        skip_logits: bool = False,
        return_dict: bool = True,
    ) -> Seq2SeqLMOutput | tuple[Any, ...]:
        refuse_attentions(output_attentions)
        output_hidden_states = bool(output_hidden_states)
        if decoder_input_ids is None:
            if labels is None:
                raise ValueError("CVM needs `labels` or `decoder_input_ids`")
            decoder_input_ids = self.prepare_decoder_input_ids_from_labels(labels)
        if encoder_outputs is None:
            encoder_outputs = self.encoder(input_ids, attention_mask, output_hidden_states=output_hidden_states)
        elif not isinstance(encoder_outputs, BaseModelOutput):
            encoder_outputs = BaseModelOutput(*encoder_outputs)
        if use_cache and past_key_values is None:
            past_key_values = EncoderDecoderCache(DynamicCache(), DynamicCache())
        elif past_key_values is not None and not isinstance(past_key_values, EncoderDecoderCache):
            raise ValueError(f"past_key_values is a {type(past_key_values).__name__}; expected an EncoderDecoderCache")

        decoded = self.decoder(
            decoder_input_ids,
            decoder_attention_mask,
            encoder_outputs.last_hidden_state,
            attention_mask,
            past_key_values,
            output_hidden_states,
        )
        if skip_logits and labels is not None:
            raise ValueError("skip_logits=True leaves no logits to compare the labels with; give decoder_input_ids")
        logits_BTV = None if skip_logits else self.lm_head(decoded.last_hidden_state)
        loss = None
        if labels is not None and logits_BTV is not None:
            loss = token_cross_entropy(logits_BTV, labels, num_items_in_batch)
        output = Seq2SeqLMOutput(
            loss=loss,
            logits=logits_BTV,
            past_key_values=decoded.past_key_values,
            decoder_hidden_states=decoded.hidden_states,
            encoder_last_hidden_state=encoder_outputs.last_hidden_state,
            encoder_hidden_states=encoder_outputs.hidden_states,
        )
        return output if return_dict else output.to_tuple()

    def prepare_decoder_input_ids_from_labels(self, labels: Tensor) -> Tensor:
        """Labels shifted right behind the start token, with padding where they do not count."""
        start = labels.new_full((labels.shape[0], 1), self.config.decoder_start_token_id)
        return torch.cat([start, labels[:, :-1]], dim=1).masked_fill(
            torch.cat([torch.zeros_like(start, dtype=torch.bool), labels[:, :-1] == -100], dim=1),
            self.config.pad_token_id,
        )


def token_cross_entropy(logits_BTV: Tensor, labels_BT: Tensor, num_items: Tensor | int | None = None) -> Tensor:
    """Cross-entropy summed over the labels that are not −100, over `num_items` or their number, at least 1."""
    total = torch.nn.functional.cross_entropy(
        logits_BTV.to(torch.promote_types(logits_BTV.dtype, torch.float32)).flatten(0, 1),
        labels_BT.flatten(),
        reduction="sum",
    )
    items = (labels_BT != -100).sum() if num_items is None else torch.as_tensor(num_items, device=total.device)
    return total / items.clamp_min(1)


AutoModelForSeq2SeqLM.register(CVMConfig, CVMForConditionalGeneration)
