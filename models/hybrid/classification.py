"""The hybrid model as a classifier of sequences.

Letters: B batch, T length, D width.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification
from transformers.modeling_outputs import SequenceClassifierOutputWithPast

from neural_layers.linear import Linear
from neural_layers.models.hybrid.config import HybridConfig
from neural_layers.models.hybrid.modeling import HybridModel, HybridPreTrainedModel
from neural_layers.pooling import AttentionPooling, GeMPooling


class LastToken(nn.Module):
    """The last token that counts, wherever padding lies: x (B, T, D), mask (B, T) → (B, D).

    Raises ValueError for a row without tokens.
    """

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is None:
            return x[:, -1]
        if x.device.type == "cpu" and not torch.compiler.is_compiling() and not bool(mask.bool().any(1).all()):
            raise ValueError("attention_mask has a row without tokens, and so without a last one")
        position_T = torch.arange(1, x.shape[1] + 1, device=x.device)
        last_B = (position_T * mask.bool()).argmax(dim=1)
        return x[torch.arange(x.shape[0], device=x.device), last_B]


class MeanPooling(nn.Module):
    """The mean over the tokens that count: x (B, T, D), mask (B, T) → (B, D); zeros for a row without tokens."""

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is None:
            return x.mean(dim=1)
        weight_BT1 = mask.to(x.dtype).unsqueeze(-1)
        return (x * weight_BT1).sum(dim=1) / weight_BT1.sum(dim=1).clamp_min(1)


class ClassificationHead(nn.Module):
    """Pool, then Linear, tanh, dropout, Linear: x (B, T, D), mask (B, T) → (B, num_labels)."""

    def __init__(self, config: HybridConfig) -> None:
        super().__init__()
        dim, labels = config.hidden_size, config.num_labels
        assert labels is not None  # derived from id2label
        pools: dict[str, Callable[[], nn.Module]] = {
            "last": LastToken,
            "mean": MeanPooling,
            "attention": lambda: AttentionPooling(dim, config.num_attention_heads),
            "gem": GeMPooling,
        }
        self.pool = pools[config.classifier_pooling]()
        self.dense = Linear(dim, dim)
        self.dropout = nn.Dropout(config.classifier_dropout)
        self.out_proj = Linear(dim, labels)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.out_proj(self.dropout(torch.tanh(self.dense(self.pool(x, mask)))))


class HybridForSequenceClassification(HybridPreTrainedModel):
    """Classify a sequence, or grade it where `problem_type` is "regression".

    forward(input_ids (B, T), attention_mask (B, T), labels (B,), …) → `SequenceClassifierOutputWithPast` with logits
    (B, num_labels). The loss follows `config.problem_type` as in all of transformers' classifiers.
    """

    def __init__(self, config: HybridConfig) -> None:
        super().__init__(config)
        self.num_labels = config.num_labels
        self.model = HybridModel(config)
        self.classifier = ClassificationHead(config)
        self.post_init()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_hidden_states: bool | None = None,
        output_attentions: bool | None = None,
        return_dict: bool = True,
    ) -> SequenceClassifierOutputWithPast | tuple[Any, ...]:
        states = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            inputs_embeds=inputs_embeds,
            use_cache=False,
            output_hidden_states=output_hidden_states,
            output_attentions=output_attentions,
        )
        logits = self.classifier(states.last_hidden_state, attention_mask)
        loss = None
        if labels is not None:
            loss = self.loss_function(labels=labels, pooled_logits=logits, config=self.config)
        output = SequenceClassifierOutputWithPast(loss=loss, logits=logits, hidden_states=states.hidden_states)
        return output if return_dict else output.to_tuple()


AutoModelForSequenceClassification.register(HybridConfig, HybridForSequenceClassification)
