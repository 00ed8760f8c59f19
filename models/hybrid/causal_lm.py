"""The hybrid model with a language-modelling head.

Letters: B batch, T length, P tokens in the cache, D width, V vocabulary.
"""

from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast

from neural_layers.kernels.linear_cross_entropy import linear_cross_entropy
from neural_layers.linear import Linear, dense_weight
from neural_layers.models.hybrid.cache import HybridCache
from neural_layers.models.hybrid.config import HybridConfig
from neural_layers.models.hybrid.context import extended_rope
from neural_layers.models.hybrid.inputs import documents, padding
from neural_layers.models.hybrid.modeling import HybridModel, HybridPreTrainedModel


class HybridForCausalLM(HybridPreTrainedModel, GenerationMixin):
    """Predict the next token.

    forward(input_ids (B, T), …) → `CausalLMOutputWithPast`; arguments as in `HybridModel`, and
      labels:             (B, T), the tokens themselves with −100 where one does not count; they are shifted here. A
                          document's first token is never predicted from the document before it.
      label_smoothing:    ε of the loss
      num_items_in_batch: what the summed loss is divided by, instead of the number of labels that count (gradient
                          accumulation)
      logits_to_keep:     0 for the logits of all tokens, n for those of the last n, or the indices to keep
      skip_logits:        leave `logits` None, so that a loss never needs them all at once; by default in training with
                          labels

    `generate` decodes with a `HybridCache`, also with an assistant and by prompt lookup.
    """

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    accepts_loss_kwargs = True

    def __init__(self, config: HybridConfig) -> None:
        super().__init__(config)
        self.model = HybridModel(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_input_embeddings(self) -> nn.Module:
        return self.model.embed_tokens

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.model.embed_tokens = value

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.lm_head = value

    def extend_context(self, max_position_embeddings: int, scaling: str | dict[str, Any] | None = "yarn") -> None:
        """Let the model read up to `max_position_embeddings` tokens; its weights stay as they are.

        scaling: how RoPE's positions are fitted into those it has learned: "yarn", "linear", "dynamic", a dict with
                 `rope_type` and its fields, or None for positions as they are. Recurrences, windows and ALiBi need
                 none. The config changes too, so that a saved model keeps it.
        Raises ValueError for a length that is not longer, a scaling that is wrong, and one of a model without RoPE;
        nothing has changed then.
        """
        parameters = extended_rope(self.config, max_position_embeddings, scaling)
        rotary, own = self.config.rotary_of(parameters), self.model.rotary
        self.config.rope_parameters = parameters
        self.config.max_position_embeddings = max_position_embeddings
        if own is not None and rotary is not None:
            own.base, own.scaling = rotary.base, rotary.scaling
            own.forget()

    def _prepare_cache_for_generation(self: Any, *args: Any, **kwargs: Any) -> Any:
        generation_config, model_kwargs = args[:2]
        is_default = generation_config.use_cache is not False and generation_config.cache_implementation is None
        if is_default and model_kwargs.get("past_key_values") is None:
            model_kwargs["past_key_values"] = HybridCache(self.config)
            if generation_config.is_assistant:
                model_kwargs["past_key_values"].activate_past_recording()
            return None
        return GenerationMixin._prepare_cache_for_generation(self, *args, **kwargs)

    def prepare_inputs_for_generation(self: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        # Where there are stop strings, transformers hands the tokenizer on to the model as well.
        kwargs.pop("tokenizer", None)
        already_read = getattr(kwargs.get("past_key_values"), "already_read", 0)
        if already_read and kwargs.get("is_first_iteration"):
            kwargs["next_sequence_length"] = args[0].shape[1] - already_read
            kwargs["past_key_values"].already_read = 0
        return GenerationMixin.prepare_inputs_for_generation(self, *args, **kwargs)

    def _assisted_decoding(self: Any, input_ids: Any, *args: Any, **kwargs: Any) -> Any:
        cache, mask = kwargs.get("past_key_values"), kwargs.get("attention_mask")
        length = getattr(kwargs["generation_config"], "_mask_length", -1) if mask is None else mask.shape[1]
        # transformers starts recording what the cache reads, and would leave it so.
        with cache.past_recording() if isinstance(cache, HybridCache) else nullcontext():
            if cache is None or length != input_ids.shape[1]:
                return GenerationMixin._assisted_decoding(self, input_ids, *args, **kwargs)
            # It would also begin by reading the whole prompt, and so what a given cache has read a second time.
            cache.already_read = cache.get_seq_length()
            try:
                return GenerationMixin._assisted_decoding(self, input_ids, *args, **kwargs)
            finally:
                cache.already_read = 0

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Any = None,
        inputs_embeds: Tensor | None = None,
        seq_idx: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        label_smoothing: float = 0.0,
        num_items_in_batch: Tensor | int | None = None,
        skip_logits: bool | None = None,
        return_dict: bool = True,
    ) -> CausalLMOutputWithPast | tuple[Any, ...]:
        states = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            seq_idx=seq_idx,
            use_cache=use_cache,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
        )
        x_BTD, loss, logits = states.last_hidden_state, None, None
        if labels is not None:
            seq_idx = documents(seq_idx, position_ids, padding(attention_mask), x_BTD, 0)
            targets_BT = next_tokens(labels, seq_idx)
            loss = language_loss(x_BTD, dense_weight(self.lm_head), targets_BT, label_smoothing, num_items_in_batch)
        if skip_logits is None:
            skip_logits = self.training and labels is not None
        if not skip_logits:
            kept = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
            logits = self.lm_head(x_BTD if isinstance(kept, slice) and not logits_to_keep else x_BTD[:, kept])
        output = CausalLMOutputWithPast(
            loss=loss, logits=logits, past_key_values=states.past_key_values, hidden_states=states.hidden_states
        )
        return output if return_dict else output.to_tuple()


def next_tokens(labels_BT: Tensor, seq_idx: Tensor | None) -> Tensor:
    """The label of the token behind each one: −100 for the last, and where another document begins there."""
    targets_BT = torch.nn.functional.pad(labels_BT[:, 1:], (0, 1), value=-100)
    if seq_idx is not None:
        own_BT = seq_idx[:, seq_idx.shape[1] - labels_BT.shape[1] :]
        is_border_BT = torch.nn.functional.pad(own_BT[:, 1:] != own_BT[:, :-1], (0, 1))
        targets_BT = targets_BT.masked_fill(is_border_BT, -100)
    return targets_BT.contiguous()


def language_loss(
    x_BTD: Tensor, weight_VD: Tensor, targets_BT: Tensor, label_smoothing: float, num_items: Tensor | int | None
) -> Tensor:
    """Cross-entropy summed over the targets that are not −100, over `num_items` or their number; 0 without any."""
    counted = (targets_BT != -100).sum()
    mean = linear_cross_entropy(x_BTD, weight_VD, targets_BT, label_smoothing=label_smoothing)
    mean = torch.where(counted > 0, mean, 0.0)
    return mean if num_items is None else mean * counted / torch.as_tensor(num_items, device=mean.device)


AutoModelForCausalLM.register(HybridConfig, HybridForCausalLM)
