"""Residual branches and what regularises them."""

from typing import Any

import torch
from torch import Tensor, nn


class LayerScale(nn.Module):
    """x · gamma, with gamma (D,) learned from `init` on (arXiv 2103.17239)."""

    def __init__(self, dim: int, init: float = 1e-5) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((dim,), init))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class StochasticDepth(nn.Module):
    """In training, zero the whole branch of a sample with probability p and scale the others by 1/(1 − p)
    (arXiv 1603.09382); the identity in evaluation. x: (B, ...).

    Raises ValueError unless 0 ≤ p < 1.
    """

    def __init__(self, p: float) -> None:
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"p={p} must lie in [0, 1)")
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        keep = torch.rand(x.shape[0], *[1] * (x.ndim - 1), device=x.device) >= self.p
        return x * (keep.to(x.dtype) / (1 - self.p))

    def extra_repr(self) -> str:
        return f"p={self.p}"


class _Residual(nn.Module):
    def __init__(
        self, norm: nn.Module, inner: nn.Module, scale: nn.Module | None = None, drop: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.norm, self.inner = norm, inner
        self.scale = nn.Identity() if scale is None else scale
        self.drop = nn.Identity() if drop is None else drop


class PreNormResidual(_Residual):
    """x + drop(scale(inner(norm(x)))). Further arguments of `forward` go to `inner`."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return x + self.drop(self.scale(self.inner(self.norm(x), *args, **kwargs)))


class PostNormResidual(_Residual):
    """norm(x + drop(scale(inner(x)))). Further arguments of `forward` go to `inner`."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return self.norm(x + self.drop(self.scale(self.inner(x, *args, **kwargs))))
