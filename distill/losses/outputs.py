"""What a loss sees of a model.

Letters: B batch, T length, N tokens or examples whose labels count, V vocabulary, D width.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from neural_layers.distill.losses.top_k import TopK


@dataclass(frozen=True)
class Outputs:
    """What a loss sees of a model. Either `logits`, or the inputs of its last linear layer with that layer's weight.

    With the latter no loss makes more logits at a time than those of a few hundred tokens.

    logits: (..., V), in the shape of the labels and one dimension more
    hidden: (..., D), the inputs of the last layer, which has no bias; head: (V, D), its weight
    states: every layer's hidden states (B, T, D), those of the embeddings first
    mask:   (B, T) of bool, the tokens whose states count; all do where left out
    cached: of a teacher: its largest logits out of a cache, instead of the above
    Raises ValueError for logits beside hidden states or a cache, and for hidden states without head.
    """

    logits: Tensor | None = None
    hidden: Tensor | None = None
    head: Tensor | None = None
    states: tuple[Tensor, ...] | None = None
    mask: Tensor | None = None
    cached: "TopK | None" = None

    def __post_init__(self) -> None:
        if (self.hidden is None) != (self.head is None):
            present, missing = ("head", "hidden") if self.hidden is None else ("hidden", "head")
            raise ValueError(f"{present} is given without {missing}; logits are made of both")
        given = [name for name in ("logits", "hidden", "cached") if getattr(self, name) is not None]
        if len(given) > 1:
            raise ValueError(f"{' and '.join(given)} are given; give one of them")

    @property
    def vocabulary(self) -> int:
        """V. Raises ValueError where there are neither logits, nor what makes them, nor a cache."""
        if self.logits is not None:
            return self.logits.shape[-1]
        if self.head is not None:
            return len(self.head)
        if self.cached is not None:
            return self.cached.vocabulary
        raise ValueError("these outputs have no logits; give logits, or hidden and head")

    def rows(self, counted: Tensor) -> "Outputs":
        """The rows of logits, or of hidden states, where `counted` (...) is true: (N, V) or (N, D).

        Logits are in at least float32: a divergence over a vocabulary in half precision loses its digits.
        Raises ValueError where the shapes differ.
        """
        if self.cached is not None:
            if len(self.cached) != counted.sum():
                raise ValueError(
                    f"the teacher cache has {len(self.cached)} rows for this batch, whose labels have "
                    f"{counted.sum().item()} that count; build the cache from the same examples and tokenizer"
                )
            return Outputs(cached=self.cached)
        name, rows = ("hidden", self.hidden) if self.logits is None else ("logits", self.logits)
        if rows is None:
            raise ValueError("these outputs have no logits; give logits, or hidden and head")
        if rows.shape[:-1] != counted.shape:
            raise ValueError(f"labels have shape {tuple(counted.shape)}; {name} {tuple(rows.shape)}")
        if self.logits is None:
            return Outputs(hidden=rows[counted], head=self.head)
        return Outputs(logits=widen(rows[counted]))

    def all_logits(self) -> Tensor:
        """The logits, made where there are none yet."""
        if self.logits is not None:
            return self.logits
        assert self.hidden is not None
        assert self.head is not None
        with torch.autocast(self.hidden.device.type, enabled=False):
            hidden, head = widen(self.hidden), widen(self.head)
            dtype = torch.promote_types(hidden.dtype, head.dtype)
            return hidden.to(dtype) @ head.to(dtype).T

    def detached(self) -> "Outputs":
        """The same, of which nothing gets a gradient."""
        parts = {
            name: None if value is None else value.detach()
            for name, value in (("logits", self.logits), ("hidden", self.hidden), ("head", self.head))
        }
        states = None if self.states is None else tuple(state.detach() for state in self.states)
        return Outputs(**parts, states=states, mask=self.mask, cached=self.cached)


def widen(tensor: Tensor) -> Tensor:
    """In at least float32."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
