"""Calibration data of a model as inputs of its graphs.

Letters: B batch, T length, S source length.
"""

import inspect
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from onnx import ModelProto
from torch import Tensor

from neural_layers.errors import InputError
from neural_layers.models.export.session import PAST

_MASKS = {"input_ids": "attention_mask", "decoder_input_ids": "decoder_attention_mask"}


def token_batches(model: Any, calibration: Iterable[Any]) -> list[dict[str, np.ndarray]]:
    """What each batch says of input_ids, attention_mask and, for an encoder-decoder, decoder_input_ids: int64 (B, T).

    calibration: batches as `quantize` takes them: a dict is `model(**batch)`, a tuple or list `model(*batch)`, a tensor
    `model(batch)`. Further arguments that are no tokens, as labels, are not needed and passed over; of an
    encoder-decoder, labels stand for decoder_input_ids.
    Raises InputError where there is no batch, and for one that is no token ids of the model.
    """
    if isinstance(calibration, Tensor | Mapping | str):
        kind = type(calibration).__name__
        raise InputError(f"calibration is a {kind}; give an iterable of batches, [batch] where there is one")
    batches = [_tokens(model, batch, f"calibration batch {i}") for i, batch in enumerate(calibration)]
    if not batches:
        raise InputError("calibration is empty; give batches of token ids such as the model is to read")
    return batches


def _tokens(model: Any, batch: Any, where: str) -> dict[str, np.ndarray]:
    given = _arguments(model, batch, where)
    if model.config.is_encoder_decoder and "decoder_input_ids" not in given:
        if not isinstance(given.get("labels"), Tensor):
            raise InputError(f"{where} has neither labels nor decoder_input_ids; give the targets too")
        given["decoder_input_ids"] = model.prepare_decoder_input_ids_from_labels(given["labels"])
    found = {}
    for name, mask in _MASKS.items():
        if name == "decoder_input_ids" and not model.config.is_encoder_decoder:
            continue
        ids = found[name] = _ids(given.get(name), f"{name} of {where}", model.config)
        found[mask] = np.ones_like(ids) if given.get(mask) is None else np.asarray(given[mask]).astype(np.int64)
        if found[mask].shape != ids.shape:
            raise InputError(f"{mask} of {where} has shape {found[mask].shape}; expected that of the ids, {ids.shape}")
    if len({len(array) for array in found.values()}) > 1:
        raise InputError(f"{where} has {len(found['input_ids'])} sources and {len(found['decoder_input_ids'])} targets")
    return found


def _arguments(model: Any, batch: Any, where: str) -> dict[str, Any]:
    try:
        if isinstance(batch, Mapping):
            bound = inspect.signature(model.forward).bind(**batch)
        else:
            bound = inspect.signature(model.forward).bind(*(batch if isinstance(batch, tuple | list) else [batch]))
    except TypeError as error:
        raise InputError(f"{where} does not fit {type(model).__name__}: {error}; name input_ids in a dict") from None
    arguments = dict(bound.arguments)
    return {**arguments, **arguments.pop("kwargs", {})}


def _ids(given: Any, what: str, config: Any) -> np.ndarray:
    if given is None:
        raise InputError(f"{what} is missing; give token ids (batch, length)")
    ids = torch.as_tensor(given)
    if ids.ndim != 2 or not ids.numel() or ids.is_floating_point() or ids.dtype == torch.bool:
        raise InputError(
            f"{what} is {ids.dtype} of shape {tuple(ids.shape)}; expected token ids (batch, length), int64"
        )
    if ids.shape[1] > config.max_position_embeddings:
        raise InputError(
            f"{what} has {ids.shape[1]} tokens, more than the context of {config.max_position_embeddings}; cut it"
        )
    wrong = ids[(ids < 0) | (ids >= config.vocab_size)]
    if wrong.numel():
        raise InputError(
            f"{what} has token id {wrong[0].item()}, outside the vocabulary of {config.vocab_size}; use this model's "
            "tokenizer"
        )
    return ids.cpu().numpy().astype(np.int64)


def decoder_feed(proto: ModelProto, ids: np.ndarray, mask: np.ndarray, **fixed: np.ndarray) -> dict[str, np.ndarray]:
    """The inputs of a graph with a state that reads rows (B, T) from their beginning, with logits of all tokens."""
    position = (mask.cumsum(1) - 1).clip(min=0)
    keep = np.array([ids.shape[1]])
    known = {"input_ids": ids, "attention_mask": mask, "position_ids": position, "keep": keep, **fixed}
    feed = {}
    for given in proto.graph.input:
        if given.name.startswith(PAST):
            sizes = given.type.tensor_type.shape.dim
            batch = [len(ids) if size.dim_param == "batch" else size.dim_value for size in sizes]
            feed[given.name] = np.zeros(batch, np.float32)  # a dimension that grows has the value 0
        elif given.name in known:  # the others, an adapter's, have a value of their own
            feed[given.name] = known[given.name]
    return feed
