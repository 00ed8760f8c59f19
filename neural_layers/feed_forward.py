"""Gated feed-forward layers."""

from collections.abc import Callable

from torch import Tensor, nn

from neural_layers.kernels.geglu import geglu
from neural_layers.kernels.swiglu import swiglu
from neural_layers.linear import Linear


class _GatedFeedForward(nn.Module):
    gate: Callable[[Tensor, Tensor], Tensor]

    def __init__(self, dim: int, hidden_dim: int | None = None, *, bias: bool = False) -> None:
        super().__init__()
        hidden_dim = default_hidden_dim(dim) if hidden_dim is None else hidden_dim
        if hidden_dim < 1:
            raise ValueError(f"hidden_dim={hidden_dim} must be at least 1")
        self.gate_proj = Linear(dim, hidden_dim, bias=bias)
        self.up_proj = Linear(dim, hidden_dim, bias=bias)
        self.down_proj = Linear(hidden_dim, dim, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(type(self).gate(self.gate_proj(x), self.up_proj(x)))


class SwiGLU(_GatedFeedForward):
    """down(silu(gate(x)) · up(x)) (arXiv 2002.05202): (..., D) → (..., D).

    hidden_dim: F; by default 8/3·D rounded up to a multiple of 64, which has the parameters of a plain layer of 4·D.
    """

    gate = staticmethod(swiglu)


class GeGLU(_GatedFeedForward):
    """down(gelu(gate(x)) · up(x)) with the tanh formula (arXiv 2002.05202): (..., D) → (..., D).

    hidden_dim: F; by default 8/3·D rounded up to a multiple of 64, which has the parameters of a plain layer of 4·D.
    """

    gate = staticmethod(geglu)


def default_hidden_dim(dim: int) -> int:
    """8/3·dim, rounded up to a multiple of 64."""
    return -(-8 * dim // (3 * 64)) * 64
