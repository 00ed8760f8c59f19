"""The state of a hybrid model between calls, which can also go back.

Letters: B batch, T length, D width, G key/value heads, S keys, K head width.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from neural_layers.cache import LayerCache
from neural_layers.models.hybrid.config import HybridConfig

_SHAPES = [
    "mixers",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "attention_head_dim",
    "sliding_window",
    "mamba_d_state",
    "mamba_d_conv",
    "mamba_expand",
    "mamba_inner_size",
    "mamba2_d_state",
    "mamba2_d_conv",
    "mamba2_expand",
    "mamba2_head_dim",
    "mamba2_n_groups",
    "mamba2_layers",
]


class HybridCacheLayer(LayerCache):
    """A `LayerCache` with what transformers' `Cache` asks its layers besides."""

    is_compileable = False
    supports_early_init = False

    @property
    def is_sliding(self) -> bool:
        return self.window is not None

    def reset(self) -> None:
        """Forget everything."""
        self.rollback(HybridCacheLayer(self.window).snapshot())


class HybridCache(Cache):
    """Keys, values and recurrent states of all layers of a `HybridModel`.

    Made by the model where none is given. Unlike transformers' `DynamicCache`, which serves too where at least one
    layer is attention, it knows its length without an attention layer, lets gradients flow from one chunk to the next,
    and goes back:
      snapshot() → a state for `rollback(state)`; it costs nothing, as tensors are replaced and never written to
      fork() → an independent cache with the same contents
      activate_past_recording(), then crop(−n): drops the last n tokens read since the last crop. A recurrence cannot
        run backwards: the cache returns to the state at the last crop and reads the kept tokens again, together with
        the next call's (`admit`), which gives the same as if the n had never been read.
      stop_past_recording(): ends that; `with past_recording():` records within
      reorder_cache(index): takes batch rows, which may repeat or be left out

    Raises ValueError for a crop that reaches further back than what is recorded.
    """

    layers: Any  # one HybridCacheLayer for each layer, which is none of transformers' own kinds

    def __init__(self, config: HybridConfig) -> None:
        mixers = config.mixers or []
        layers: Any = [_layer(name, config) for name in mixers]
        super().__init__(layers=layers)
        self._signature = [getattr(config, name) for name in _SHAPES]
        self._length = 0  # tokens in the layers
        self._batch: int | None = None
        self._recording = False
        self._before: HybridCache | None = None  # the state at the last crop
        self._since: list[tuple[Tensor, Tensor]] = []  # embeddings and positions read since then
        self._pending: tuple[Tensor, Tensor] | None = None  # kept by a crop, to be read again by the next call

    # What the model calls.

    def check(self, config: HybridConfig, batch: int) -> None:
        """Raise ValueError unless the cache was made for such a model and holds as many rows as `batch`."""
        for name, own in zip(_SHAPES, self._signature, strict=True):
            if own != getattr(config, name):
                raise ValueError(f"the cache was made for a model with {name}={own}, not {getattr(config, name)}")
        if self._batch is not None and self._batch != batch:
            raise ValueError(f"the cache holds {self._batch} rows, and the input has {batch}")

    def admit(self, x_BTD: Tensor, position_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Embeddings and positions that the layers are to read: those given, behind those kept by a crop."""
        self._batch = x_BTD.shape[0]
        if self._pending is not None:
            kept, positions = self._pending
            x_BTD = torch.cat([kept.to(x_BTD), x_BTD], dim=1)
            position_ids = torch.cat([positions.expand(position_ids.shape[0], -1), position_ids], dim=1)
            self._pending = None
        if self._recording:
            if self._before is None:
                self._before = self.fork()
            self._since.append((x_BTD.detach(), position_ids))
        self._length += x_BTD.shape[1]
        return x_BTD, position_ids

    # What a user calls.

    def fork(self) -> "HybridCache":
        """An independent cache with the same contents; tensors are shared until one of the two goes on."""
        copy = object.__new__(HybridCache)
        copy.__dict__.update(self.__dict__)
        copy.layers = [layer.fork() for layer in self.layers]
        copy._since = list(self._since)
        return copy

    snapshot = fork

    def rollback(self, snapshot: "HybridCache") -> None:
        """Return to the contents of a `snapshot`, which stays usable. Recording goes on, or does not, as before."""
        is_recording = self._recording
        self.__dict__.update(snapshot.fork().__dict__)
        if is_recording:
            self.activate_past_recording()
        else:
            self.stop_past_recording()

    def activate_past_recording(self) -> None:
        self._recording = True

    def stop_past_recording(self) -> None:
        """Drop what is recorded and record no more; what a crop has kept is still read by the next call."""
        self._recording, self._before, self._since = False, None, []

    @contextmanager
    def past_recording(self) -> Iterator[None]:
        """Record within, and behind only if it was so before: without crops, what is recorded piles up."""
        was_recording = self._recording
        self.activate_past_recording()
        try:
            yield
        finally:
            if not was_recording:
                self.stop_past_recording()

    def crop(self, tokens_to_remove: int) -> None:
        """Drop the last |tokens_to_remove| tokens, given as a number ≤ 0 as transformers does; 0 only forgets what was
        recorded before."""
        if tokens_to_remove > 0:
            raise ValueError(f"crop takes the tokens to remove as a number ≤ 0, not {tokens_to_remove}")
        removed = -tokens_to_remove
        if removed and all(_is_full_attention(layer) for layer in self.layers):
            self._crop_keys(removed)
        elif removed:
            self._go_back(removed)
        self._before, self._since = None, []

    def _go_back(self, removed: int) -> None:
        """Return to the last crop, with what was read since, less the last `removed` tokens, to be read again."""
        # Between two crops with no call in between, what the first one kept is all there is to drop from.
        read = self._since or ([] if self._pending is None else [self._pending])
        recorded = sum(x.shape[1] for x, _ in read)
        if removed > recorded:
            raise ValueError(
                f"cannot drop {removed} tokens: {recorded} are recorded since the last crop; call "
                "activate_past_recording() before they are read, or snapshot() and rollback()"
            )
        x_BTD, positions = (torch.cat(parts, dim=1) for parts in zip(*read, strict=True))
        kept = recorded - removed
        if self._before is not None:
            self.rollback(self._before)
        self._pending = (x_BTD[:, :kept], positions[:, :kept]) if kept else None

    def _crop_keys(self, removed: int) -> None:
        if removed > self._length:
            raise ValueError(f"cannot drop {removed} tokens: the cache holds {self._length}")
        self._length -= removed
        for layer in self.layers:
            layer.crop(self._length)

    # What transformers calls.

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """The number of tokens read, those that a crop has kept for the next call included."""
        return self._length + (0 if self._pending is None else self._pending[0].shape[1])

    def get_max_length(self, layer_idx: int | None = None) -> int:
        return -1

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        return self.get_seq_length() + query_length, 0

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return self.get_seq_length() > 0

    def reset(self) -> None:
        for layer in self.layers:
            layer.reset()
        self._length, self._batch, self._before, self._since, self._pending = 0, None, None, [], None

    def reorder_cache(self, beam_idx: Tensor) -> None:
        for layer in self.layers:
            layer.reorder(beam_idx)
        if self._batch is not None:
            self._batch = len(beam_idx)
        if self._before is not None:
            self._before = self._before.fork()
            self._before.reorder_cache(beam_idx)
        self._since = [_reorder(read, beam_idx) for read in self._since]
        self._pending = None if self._pending is None else _reorder(self._pending, beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if self._batch is not None:
            self.reorder_cache(torch.arange(self._batch).repeat_interleave(repeats))

    @property
    def batch_size(self) -> int:
        return -1 if self._batch is None else self._batch

    @property
    def is_initialized(self) -> bool:
        return self._batch is not None

    @property
    def is_croppable(self) -> bool:
        return self._recording or all(_is_full_attention(layer) for layer in self.layers)

    @property
    def is_compileable(self) -> bool:
        return False


def _layer(mixer: str, config: HybridConfig) -> HybridCacheLayer:
    return HybridCacheLayer(config.sliding_window if mixer == "sliding_attention" else None)


def _is_full_attention(layer: Any) -> bool:
    return layer.keys is not None and layer.window is None


def _reorder(read: tuple[Tensor, Tensor], index: Tensor) -> tuple[Tensor, Tensor]:
    x_BTD, positions = read
    index = index.to(x_BTD.device)
    return x_BTD.index_select(0, index), positions if len(positions) == 1 else positions.index_select(0, index)
