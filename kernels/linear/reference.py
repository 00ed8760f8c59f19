"""The definition of the linear layer, in plain arithmetic."""

from torch import Tensor

from neural_layers.kernels.arguments import accumulation_dtype


def linear_reference(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """y_o = Σ_i x_i · W_oi + bias_o."""
    wide = x.to(accumulation_dtype(x, weight))
    y = (wide.unsqueeze(-2) * weight).sum(dim=-1)
    return (y if bias is None else y + bias).to(x.dtype)
