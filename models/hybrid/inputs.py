"""What a hybrid model is given, checked and completed.

Letters: B batch, T length, P tokens in the cache.
"""

from typing import Any

import torch
from torch import Tensor

from neural_layers.models.hybrid.cache import HybridCache
from neural_layers.models.hybrid.config import HybridConfig


def tokens_seen(cache: Any) -> int:
    """P. Raises ValueError for a cache that cannot tell, because none of its layers is attention."""
    if cache is None:
        return 0
    try:
        return cache.get_seq_length()
    except ValueError as error:
        raise ValueError(
            f"{type(cache).__name__} does not know its length without an attention layer; use HybridCache(config)"
        ) from error


def check_input(config: HybridConfig, given: Any, past: int, cache: Any) -> None:
    """Raise ValueError for what cannot be read: empty input, too long a context, unknown ids, a cache that does not
    fit."""
    if given.ndim < 2 or given.shape[1] == 0:
        raise ValueError(f"the input has shape {tuple(given.shape)}; expected (B, T) with at least one token")
    length, limit = past + given.shape[1], config.max_position_embeddings
    if length > limit:
        raise ValueError(
            f"{length} tokens are more than max_position_embeddings={limit}; shorten the input, or "
            "model.extend_context(…)"
        )
    _check_ids(config, given)
    if cache is None:
        return
    if isinstance(cache, HybridCache):
        cache.check(config, given.shape[0])
    elif len(cache.layers) not in (0, config.num_hidden_layers):
        raise ValueError(f"the cache has {len(cache.layers)} layers, and the model {config.num_hidden_layers}")


def _check_ids(config: HybridConfig, given: Tensor) -> None:
    # On the CPU alone, where looking costs nothing; a graph cannot look, and a GPU would have to wait.
    if given.is_floating_point() or given.device.type != "cpu" or torch.compiler.is_compiling() or not given.numel():
        return
    low, high = (int(bound) for bound in given.aminmax())
    if low < 0 or high >= config.vocab_size:
        wrong = low if low < 0 else high
        raise ValueError(f"token id {wrong} lies outside the vocabulary of {config.vocab_size}")


def covering_mask(attention_mask: Tensor | None, x_BTD: Tensor, past: int) -> Tensor | None:
    """The mask (B, P + T), or None where every token counts. Raises ValueError for another shape."""
    if attention_mask is None:
        return None
    expected = (x_BTD.shape[0], past + x_BTD.shape[1])
    if attention_mask.ndim != 2 or tuple(attention_mask.shape) != expected:
        raise ValueError(
            f"attention_mask has shape {tuple(attention_mask.shape)}; expected (B, P + T) = {expected}: one column for "
            f"each of the P={past} tokens in the cache and the T={x_BTD.shape[1]} of the input"
        )
    return padding(attention_mask)


def padding(attention_mask: Tensor | None) -> Tensor | None:
    """The mask, or None where every token counts: it then says nothing, and kernels run without it."""
    if attention_mask is None or torch.compiler.is_compiling() or attention_mask.device.type != "cpu":
        return attention_mask
    return None if bool(attention_mask.all()) else attention_mask


def documents(
    seq_idx: Tensor | None, position_ids: Tensor | None, attention_mask: Tensor | None, x_BTD: Tensor, past: int
) -> Tensor | None:
    """The document of each token: `seq_idx`, or what positions that do not rise say where there is no padding.

    Raises ValueError where positions restart behind a filled cache: what lies in the cache then needs its documents.
    """
    if seq_idx is not None or position_ids is None or attention_mask is not None:
        return seq_idx
    is_compiling = torch.compiler.is_compiling()
    if x_BTD.shape[1] == 1 or (past and is_compiling):
        return None
    if tuple(position_ids.shape) not in {(1, x_BTD.shape[1]), tuple(x_BTD.shape[:2])}:
        raise ValueError(
            f"position_ids has shape {tuple(position_ids.shape)}; expected {tuple(x_BTD.shape[:2])}, or one row for all"
        )
    starts = position_ids[:, 1:] <= position_ids[:, :-1]
    if not is_compiling and not bool(starts.any()):
        return None
    if past:
        raise ValueError("position_ids restart behind a filled cache; give seq_idx (B, P + T) for old and new tokens")
    index = torch.nn.functional.pad(starts.long().cumsum(1), (1, 0))
    return index.expand(x_BTD.shape[0], -1)
