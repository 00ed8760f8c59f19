"""The state that a mixer carries from one call to the next.

`LayerCache` has the methods of transformers' cache layers (`update`, `update_conv_state`, `update_recurrent_state`,
`get_seq_length`, `reorder_cache`), so that a mixer takes either. Its tensors are replaced and never written to: a
snapshot costs nothing, and gradients flow through the state from one chunk to the next.
"""

import copy
from typing import Any

import torch
from torch import Tensor

_STATE = ("keys", "values", "length", "_conv_state", "_recurrent_state")


class LayerCache:
    """What one layer remembers: keys and values, or the states of a convolution and a recurrence, or all of them.

    window: None, or the window w of the attention; then only the last w − 1 keys are kept, which is all that the next
            token can see.

    Layouts are those of transformers: keys and values (B, G, S, K), convolution state (B, E, W − 1), recurrent state
    as the mixer gives it.
    """

    def __init__(self, window: int | None = None) -> None:
        if window is not None and window < 1:
            raise ValueError(f"window={window} must be at least 1")
        self.window = window
        self.length = 0
        self.keys: Tensor | None = None
        self.values: Tensor | None = None
        self._conv_state: Tensor | None = None
        self._recurrent_state: Tensor | None = None

    def get_seq_length(self) -> int:
        """The number of tokens seen so far by the attention."""
        return self.length

    def update(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Append keys and values (B, G, T, K); return all that the new queries may see."""
        self.length += keys.shape[2]
        if self.keys is not None and self.values is not None:
            keys, values = torch.cat([self.keys, keys], dim=2), torch.cat([self.values, values], dim=2)
        kept = keys.shape[2] if self.window is None else min(self.window - 1, keys.shape[2])
        start = keys.shape[2] - kept
        self.keys, self.values = keys[:, :, start:], values[:, :, start:]
        return keys, values

    @property
    def has_previous_state(self) -> dict[int, bool]:
        """Whether a convolution has been seen, under the index 0 that transformers' layers use."""
        return {0: self._conv_state is not None}

    @property
    def conv_states(self) -> dict[int, Tensor | None]:
        """The convolution's last inputs, under the index 0 that transformers' layers use."""
        return {0: self._conv_state}

    @property
    def recurrent_states(self) -> dict[int, Tensor | None]:
        """The recurrent state, under the index 0 that transformers' layers use."""
        return {0: self._recurrent_state}

    def update_conv_state(self, inputs: Tensor, *, conv_kernel_size: int) -> Tensor:
        """Append the convolution's inputs (B, E, T); keep the last `conv_kernel_size`; return old and new together."""
        if self._conv_state is not None:
            inputs = torch.cat([self._conv_state, inputs], dim=-1)
        elif inputs.shape[-1] < conv_kernel_size:
            inputs = torch.nn.functional.pad(inputs, (conv_kernel_size - inputs.shape[-1], 0))
        self._conv_state = inputs[..., inputs.shape[-1] - conv_kernel_size :]
        return inputs

    def update_recurrent_state(self, state: Tensor) -> Tensor:
        """Replace the recurrent state; return it."""
        self._recurrent_state = state
        return state

    def reorder(self, index: Tensor) -> None:
        """Take the batch rows `index` (as beam search selects them; rows may repeat or be left out)."""
        for name in _STATE:
            value = getattr(self, name)
            if isinstance(value, Tensor):
                setattr(self, name, value.index_select(0, index.to(value.device)))

    reorder_cache = reorder

    def fork(self) -> "LayerCache":
        """An independent cache with the same contents; the tensors are shared until one of the two goes on."""
        return copy.copy(self)

    def snapshot(self) -> dict[str, Any]:
        """The contents, to be given back to `rollback`."""
        return {name: getattr(self, name) for name in _STATE}

    def rollback(self, snapshot: dict[str, Any]) -> None:
        """Return to the contents of a `snapshot`."""
        for name in _STATE:
            setattr(self, name, snapshot[name])

    def crop(self, length: int) -> None:
        """Keep the first `length` tokens. Keys and values only: raises ValueError where a recurrent state would have
        to run backwards, or where the window has dropped keys that would be needed again (use `snapshot`, `rollback`).
        """
        if not 0 <= length <= self.length:
            raise ValueError(f"crop to {length} tokens, but the cache holds {self.length}")
        removed = self.length - length
        if removed and (self._conv_state is not None or self._recurrent_state is not None):
            raise ValueError("a recurrent state cannot be cropped; use snapshot() before and rollback() after")
        if removed and self.keys is not None and self.values is not None:
            if self.keys.shape[2] < self.length:
                raise ValueError(f"window={self.window} has dropped keys; use snapshot() before and rollback() after")
            self.keys, self.values = self.keys[:, :, :length], self.values[:, :, :length]
        self.length = length
