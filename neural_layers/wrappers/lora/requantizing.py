"""A layer like another one, with other numbers in its weight."""

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from neural_layers.errors import InputError
from neural_layers.linear_4bit import Linear4bit
from neural_layers.linear_int4 import LinearInt4
from neural_layers.linear_int8 import LinearInt8
from neural_layers.quantized_embedding import Embedding4bit, EmbeddingInt4, EmbeddingInt8
from neural_layers.wrappers.pruning.masks import mask_of


def with_weight(base: Any, exact: Tensor) -> nn.Module:
    """A layer like `base` that computes with `exact` instead of its weight; its bias is the same tensor.

    A float weight is rounded to its dtype, and where the layer is pruned, is zero where that is; a quantized one is
    quantized again as it was. Raises InputError for a layer that has no way to that.
    """
    weight = base._parameters.get("weight")
    if weight is not None and weight.is_floating_point():
        # Only the tables of the module are copied: what else it holds stays the same.
        new: Any = copy.copy(base)
        for table in ("_parameters", "_buffers", "_modules", "_forward_pre_hooks"):
            setattr(new, table, copy.copy(getattr(base, table)))
        new._non_persistent_buffers_set = set(base._non_persistent_buffers_set)
        mask = mask_of(base)
        made = exact if mask is None else exact.masked_fill(~mask, 0)
        new._parameters["weight"] = nn.Parameter(made.to(weight.dtype), requires_grad=weight.requires_grad)
        return new
    again = next((make for kind, make in _QUANTIZED.items() if isinstance(base, kind)), None)
    if again is None:
        raise InputError(f"a {type(base).__name__} cannot take another weight; merge before it is quantized")
    new = again(base, _carrier(base, exact))
    if getattr(base, "bias", None) is not None:
        new.bias = base.bias
    return new


def _carrier(base: Any, exact: Tensor) -> Any:
    """A float layer with the weight, for the constructors of quantized ones."""
    plain: Any
    if hasattr(base, "num_embeddings"):
        plain = nn.Embedding(exact.shape[0], exact.shape[1], getattr(base, "padding_idx", None), device="meta")
    else:
        plain = nn.Linear(exact.shape[1], exact.shape[0], bias=False, device="meta")
    dtype = getattr(base, "weight_dtype", torch.float32)
    plain.weight = nn.Parameter(exact.to(dtype), requires_grad=False)
    return plain.train(base.training)


def _int8(base: Any, plain: Any) -> LinearInt8:
    layer = LinearInt8.from_linear(plain)
    if base.static:
        layer.calibrate(base.input_scale, base.input_zero_point)
    return layer


def _nested(base: Any) -> bool:
    return base.quantized.nested_absmax is not None


_QUANTIZED: dict[type[nn.Module], Callable[[Any, Any], Any]] = {
    Linear4bit: lambda base, plain: Linear4bit.from_linear(plain, base.quant_type, base.block_size, _nested(base)),
    LinearInt8: _int8,
    LinearInt4: lambda base, plain: LinearInt4.from_linear(plain, base.block_size),
    Embedding4bit: lambda base, plain: Embedding4bit.from_embedding(
        plain, base.quant_type, base.block_size, _nested(base)
    ),
    EmbeddingInt8: lambda base, plain: EmbeddingInt8.from_embedding(plain),
    EmbeddingInt4: lambda base, plain: EmbeddingInt4.from_embedding(plain, base.block_size),
}
