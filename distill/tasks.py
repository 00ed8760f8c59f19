"""What a loss sees of each kind of model, from one batch.

Letters: B batch, T length, S source length, V vocabulary, D width.
"""

import inspect
from functools import lru_cache
from typing import Any, Protocol

import torch.nn.functional as F
from torch import Tensor, nn

from neural_layers.distill.data.batches import IGNORED_LABEL
from neural_layers.distill.losses import Outputs
from neural_layers.linear import dense_weight


class Task(Protocol):
    """One kind of model: what it is given of a batch, what its loss sees, and which labels count."""

    def labels(self, batch: dict[str, Tensor]) -> Tensor:
        """The labels in the shape of the outputs, −100 where one does not count."""

    def outputs(self, model: nn.Module, batch: dict[str, Tensor], with_states: bool) -> Outputs:
        """What the loss sees of `model` (which may be wrapped by DDP) on the batch; hidden states where asked for."""


class Seq2SeqTask:
    """Encoder-decoders: `input_ids` (B, S), `attention_mask` (B, S), `labels` (B, T) with −100 behind each end.

    model: the student without a wrapper, which makes the decoder's inputs of the labels; they go to the teacher too.
    Raises ValueError for a model that is no encoder-decoder.
    """

    def __init__(self, model: Any) -> None:
        if not model.config.is_encoder_decoder:
            raise ValueError(f"{type(model).__name__} is no encoder-decoder; distil it as what it is: CausalTask, …")
        self._shift = model.prepare_decoder_input_ids_from_labels

    def labels(self, batch: dict[str, Tensor]) -> Tensor:
        """(B, T)."""
        return batch["labels"]

    def outputs(self, model: nn.Module, batch: dict[str, Tensor], with_states: bool) -> Outputs:
        """Of the decoder; states are of the decoder too."""
        # Decoder inputs and not labels go to the models: with labels each would also compute a loss of its own.
        inputs = {name: value for name, value in batch.items() if name not in ("labels", "index")}
        inputs["decoder_input_ids"] = self._shift(batch["labels"])
        return _language_outputs(model, inputs, with_states, "decoder_hidden_states", batch["labels"] != IGNORED_LABEL)


class CausalTask:
    """Decoder-only language models: `input_ids` and `labels` (B, T), −100 at the first token of each document, and
    whatever else the models take (`seq_idx`, `position_ids`, `attention_mask`)."""

    def labels(self, batch: dict[str, Tensor]) -> Tensor:
        """(B, T): the label of the next token stands at each, −100 at the last."""
        return F.pad(batch["labels"][:, 1:], (0, 1), value=IGNORED_LABEL)

    def outputs(self, model: nn.Module, batch: dict[str, Tensor], with_states: bool) -> Outputs:
        """Of every token."""
        inputs: dict[str, Any] = {name: value for name, value in batch.items() if name not in ("labels", "index")}
        mask = batch.get("attention_mask")
        inputs["use_cache"] = False
        return _language_outputs(model, inputs, with_states, "hidden_states", None if mask is None else mask.bool())


class ClassificationTask:
    """Classifiers of texts: `input_ids` and `attention_mask` (B, T), `labels` (B,)."""

    def labels(self, batch: dict[str, Tensor]) -> Tensor:
        """(B,)."""
        return batch["labels"]

    def outputs(self, model: nn.Module, batch: dict[str, Tensor], with_states: bool) -> Outputs:
        """Logits (B, number of classes) and the states of the tokens."""
        inputs = {name: value for name, value in batch.items() if name not in ("labels", "index")}
        output = model(**inputs, output_hidden_states=with_states)
        mask = batch.get("attention_mask")
        states = tuple(output.hidden_states) if with_states else None
        return Outputs(logits=output.logits, states=states, mask=None if mask is None else mask.bool())


def _language_outputs(
    model: nn.Module, inputs: dict[str, Any], with_states: bool, name: str, mask: Tensor | None
) -> Outputs:
    """The inputs of the last layer and its weight from a model that can leave out its logits, else the logits."""
    plain: Any = getattr(model, "module", model)  # what DDP wraps
    kind: Any = type(plain)
    if not _can_skip_logits(kind):
        output = model(**inputs, output_hidden_states=with_states)
        return Outputs(logits=output.logits, states=tuple(output[name]) if with_states else None, mask=mask)
    output = model(**inputs, output_hidden_states=True, skip_logits=True)
    states = tuple(output[name])
    head = dense_weight(plain.get_output_embeddings())
    return Outputs(hidden=states[-1], head=head, states=states if with_states else None, mask=mask)


@lru_cache
def _can_skip_logits(kind: Any) -> bool:
    return "skip_logits" in inspect.signature(kind.forward).parameters
