"""One adapter of one layer, and which adapters of a layer are in use.

Letters: R rank.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

BASE = None  # in place of an adapter's name: the row that passes the base layer alone


@dataclass(frozen=True)
class Settings:
    """What an adapter of a layer is besides its tensors: rank, alpha, the dropout of its inputs, how it is scaled."""

    r: int
    alpha: float
    dropout: float = 0.0
    use_rslora: bool = False
    use_dora: bool = False

    @property
    def scale(self) -> float:
        """s: alpha / r, or alpha / √r with rsLoRA."""
        return self.alpha / (self.r**0.5 if self.use_rslora else self.r)


class Adapter(nn.Module):
    """A (R, inputs…), B (outputs, R…) and, with DoRA, the magnitude of each output."""

    magnitude: nn.Parameter | None

    def __init__(self, settings: Settings, a: Tensor, b: Tensor, magnitude: Tensor | None = None) -> None:
        super().__init__()
        self.settings = settings
        self.lora_A, self.lora_B = nn.Parameter(a), nn.Parameter(b)
        self.register_parameter("magnitude", None if magnitude is None else nn.Parameter(magnitude))

    def product(self, dtype: torch.dtype | None = None) -> Tensor:
        """s · B · A as a matrix (outputs, inputs), computed in `dtype`, by default in that of the adapter."""
        dtype = self.lora_A.dtype if dtype is None else dtype
        return (self.lora_B.flatten(1).to(dtype) @ self.lora_A.flatten(1).to(dtype)) * self.settings.scale

    def extra_repr(self) -> str:
        return f"{self.settings}"


@dataclass(frozen=True)
class Selection:
    """Which adapters change a layer's weight: W + Σ weight · ΔW, or one adapter for each row of the batch.

    weights: of the adapters in use. rows: for each row the name of its adapter, None for the base alone; or None where
    all rows are treated alike. is_disabled: the base alone, for all.
    """

    weights: tuple[tuple[str, float], ...] = ()
    rows: tuple[str | None, ...] | None = None
    is_disabled: bool = False

    def groups(self) -> dict[str | None, list[int]]:
        """The rows that each adapter serves."""
        found: dict[str | None, list[int]] = {}
        for index, name in enumerate(self.rows or ()):
            found.setdefault(name, []).append(index)
        return found
