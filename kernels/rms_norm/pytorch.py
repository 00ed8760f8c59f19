"""RMSNorm through torch's own function, which is traceable and differentiable to any order."""

import torch.nn.functional
from torch import Tensor

from neural_layers.kernels.arguments import accumulation_dtype


def rms_norm_torch(x: Tensor, weight: Tensor, eps: float = 1e-6) -> Tensor:
    """x / sqrt(mean(x²) + eps) · weight."""
    wide_dtype = accumulation_dtype(x, weight)
    wide = torch.nn.functional.rms_norm(x.to(wide_dtype), x.shape[-1:], weight.to(wide_dtype), eps)
    return wide.to(x.dtype)
