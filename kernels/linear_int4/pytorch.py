"""The affine 4-bit linear layer through torch's matrix product (backend `torch`), on any device."""

import torch
from torch import Tensor

from neural_layers.kernels.dequantize_int4.pytorch import weight_in
from neural_layers.kernels.int4 import QuantizedInt4


def product(x: Tensor, quantized: QuantizedInt4, bias: Tensor | None) -> Tensor:
    """x Wᵀ + bias; the weight is rounded to the dtype of x."""
    # Inside autocast the product would otherwise run in, and return, another dtype.
    with torch.autocast(x.device.type, enabled=False):
        weight = weight_in(quantized, torch.float64 if x.dtype == torch.float64 else torch.float32).to(x.dtype)
        if bias is not None and bias.dtype == x.dtype:
            return torch.nn.functional.linear(x, weight, bias)
        y = x @ weight.T
        return y if bias is None else (y + bias).to(x.dtype)
