"""The definition of RMSNorm, in plain arithmetic."""

from torch import Tensor

from neural_layers.kernels.arguments import accumulation_dtype


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight."""
    wide = x.to(accumulation_dtype(x, weight))
    mean_square = (wide * wide).sum(dim=-1, keepdim=True) / x.shape[-1]
    return (wide / (mean_square + eps).sqrt() * weight).to(x.dtype)
