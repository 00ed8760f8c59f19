"""A rotary embedding whose tables all layers of one forward share."""

import torch
from torch import Tensor

from neural_layers.position import RotaryEmbedding


class SharedRotary(RotaryEmbedding):
    """A `RotaryEmbedding` that remembers the tables of the last `position_ids` it was given.

    All layers of a model ask for the tables of the same tensor: they are computed once. Compiled graphs do not need it
    (equal expressions are computed once there anyway) and do not use it.
    """

    _last: tuple[Tensor, torch.dtype, int, bool, tuple[Tensor, Tensor]] | None = None

    def forward(self, position_ids: Tensor, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
        if torch.compiler.is_compiling():
            return super().forward(position_ids, dtype)
        inference = torch.is_inference_mode_enabled()
        # Tensors made in inference mode have no version, and cannot be saved for a backward outside of it.
        version = 0 if position_ids.is_inference() else position_ids._version
        last = self._last
        if last is None or last[0] is not position_ids or last[1:4] != (dtype, version, inference):
            tables = super().forward(position_ids, dtype)
            self._last = last = (position_ids, dtype, version, inference, tables)
        return last[4]

    def forget(self) -> None:
        """Drop what is remembered: the forward has ended."""
        self._last = None
