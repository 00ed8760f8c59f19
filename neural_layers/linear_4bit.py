"""A linear layer whose weight stays in 4 bits."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from neural_layers.kernels.four_bit import Quantized4bit, check_quantized
from neural_layers.kernels.four_bit_state import from_state, to_state
from neural_layers.kernels.linear_4bit import linear_4bit
from neural_layers.kernels.quantize_4bit import quantize_4bit

_BITS = ("weight", "absmax", "offset", "nested_absmax")


class Linear4bit(nn.Module):
    """y = x Wᵀ + b with W in NF4 or FP4 (arXiv 2305.14314): (..., in) → (..., out) in the dtype of x.

    quant_type, block_size, double_quant: of `quantize_4bit`.
    device, dtype: where W is drawn, as `nn.Linear` draws it, before it is quantized, and the dtype of the bias.

    W is frozen; the gradient flows to x and to the bias. Its bits are buffers that move between devices and that no
    `.to(dtype)`, `.half()` or `.double()` changes. `state_dict` has the keys and the bits that bitsandbytes' Linear4bit
    writes and reads: `weight`, `weight.absmax`, `weight.quant_map`, `weight.nested_absmax`, `weight.nested_quant_map`
    and `weight.quant_state.bitsandbytes__nf4` (or `fp4`), a JSON text. `load_state_dict` refuses a weight of another
    shape, quant_type, block_size or nesting with an error that names both.
    """

    weight: Tensor
    absmax: Tensor
    offset: Tensor | None
    nested_absmax: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        quant_type: str = "nf4",
        block_size: int = 64,
        double_quant: bool = False,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        plain = nn.Linear(in_features, out_features, bias=bias, device=device, dtype=dtype)
        self.in_features, self.out_features = in_features, out_features
        self.bias = plain.bias
        for name in _BITS:
            # The names of the others in a state dict contain a dot, which those of buffers cannot.
            self.register_buffer(name, None, persistent=name == "weight")
        self.quantized = quantize_4bit(plain.weight, quant_type, block_size, double_quant)

    @classmethod
    def from_linear(
        cls, linear: nn.Linear, quant_type: str = "nf4", block_size: int = 64, double_quant: bool = False
    ) -> "Linear4bit":
        """The layer with the weight of `linear` in 4 bits and a copy of its bias, on the same device."""
        if not isinstance(linear, nn.Linear):
            raise TypeError(f"linear is a {type(linear).__name__}; expected an nn.Linear")
        layer = cls(linear.in_features, linear.out_features, bias=False, device="meta")
        layer.quantized = quantize_4bit(linear.weight, quant_type, block_size, double_quant)
        if linear.bias is not None:
            layer.bias = nn.Parameter(linear.bias.detach().clone(), requires_grad=linear.bias.requires_grad)
        return layer.train(linear.training)

    @property
    def quantized(self) -> Quantized4bit:
        """The weight (out, in) as the 4-bit ops take it; assigning another of that shape replaces it."""
        shape = (self.out_features, self.in_features)
        constants = (self.quant_type, self.block_size, shape, self.weight_dtype)
        return Quantized4bit(self.weight, self.absmax, *constants, self.offset, self.nested_absmax)

    @quantized.setter
    def quantized(self, record: Quantized4bit) -> None:
        check_quantized(record)
        if record.shape != (self.out_features, self.in_features):
            expected = (self.out_features, self.in_features)
            raise ValueError(f"the quantized weight has shape {record.shape}; expected (out, in) = {expected}")
        self.weight, self.absmax = record.packed, record.absmax
        self.offset, self.nested_absmax = record.offset, record.nested_absmax
        self.quant_type, self.block_size, self.weight_dtype = record.quant_type, record.block_size, record.dtype

    def forward(self, x: Tensor) -> Tensor:
        return linear_4bit(x, self.quantized, self.bias)

    def extra_repr(self) -> str:
        sizes = f"{self.in_features}, {self.out_features}, bias={self.bias is not None}"
        return f"{sizes}, {_format(self.quantized)}"

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Linear4bit":
        before = {name: self._buffers[name] for name in _BITS}
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            after = self._buffers[name]
            # Another device is taken over, another dtype is not: a cast absmax would be another weight.
            if tensor is not None and after is not None and after.dtype != tensor.dtype:
                self._buffers[name] = tensor.to(after.device)
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, tensor in to_state(self.quantized).items():
            destination[f"{prefix}weight.{name}"] = tensor

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        start = f"{prefix}weight."
        state = {key.removeprefix(start): value for key, value in state_dict.items() if key.startswith(start)}
        rest = {key: value for key, value in state_dict.items() if not key.startswith(start)}
        packed = rest.pop(f"{prefix}weight", None)
        if packed is not None:
            try:
                record = self._read(packed, state)
            except (TypeError, ValueError) as problem:
                error_msgs.append(f"{prefix}weight: {problem}")
                record = self.quantized
            rest[f"{prefix}weight"] = record.packed
            self.weight_dtype = record.dtype
            for name in _BITS[1:]:
                own, given = self._buffers[name], getattr(record, name)
                if own is None or local_metadata.get("assign_to_params_buffers", False):
                    self._buffers[name] = given
                else:
                    own.copy_(given)
        elif strict:
            own_names = [name for name in to_state(self.quantized) if name not in state]
            missing_keys += [start + name for name in own_names]
        super()._load_from_state_dict(rest, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)

    def _read(self, packed: Tensor, state: dict[str, Tensor]) -> Quantized4bit:
        """The record in a state dict, if it is of this layer's format."""
        if not state and packed.is_floating_point():
            raise ValueError("the weight is not quantized; load it into an nn.Linear and use Linear4bit.from_linear")
        record, own = from_state(packed, state), self.quantized
        if _format(record) != _format(own) or record.shape != own.shape:
            raise ValueError(
                f"the weight is {record.shape}, {_format(record)}; the layer was built for {own.shape}, {_format(own)}"
            )
        return record


def _format(record: Quantized4bit) -> str:
    nested = record.nested_absmax is not None
    return f"quant_type={record.quant_type!r}, block_size={record.block_size}, double_quant={nested}"
