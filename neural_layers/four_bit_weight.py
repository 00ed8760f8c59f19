"""A module whose weight stays in NF4 or FP4, saved as bitsandbytes saves it."""

from typing import Any

import torch
from torch import Tensor

from neural_layers.frozen_bits import FrozenBits
from neural_layers.kernels.four_bit import Quantized4bit, check_quantized
from neural_layers.kernels.four_bit_state import from_state, to_state

_BITS = ("weight", "absmax", "offset", "nested_absmax")


class FourBitWeight(FrozenBits):
    """What `Linear4bit` and `Embedding4bit` share: the bits of a `Quantized4bit` as buffers, and their state dict.

    The state dict has the keys and the bits that bitsandbytes' Linear4bit writes and reads.
    """

    bits = _BITS
    weight: Tensor
    absmax: Tensor
    offset: Tensor | None
    nested_absmax: Tensor | None
    quant_type: str
    block_size: int
    weight_dtype: torch.dtype

    def _register_bits(self) -> None:
        for name in _BITS:
            # The names of the others in a state dict contain a dot, which those of buffers cannot.
            self.register_buffer(name, None, persistent=name == "weight")

    @property
    def quantized(self) -> Quantized4bit:
        """The weight as the 4-bit ops take it; assigning another of that shape replaces it."""
        constants = (self.quant_type, self.block_size, self.shape, self.weight_dtype)
        return Quantized4bit(self.weight, self.absmax, *constants, self.offset, self.nested_absmax)

    @quantized.setter
    def quantized(self, record: Quantized4bit) -> None:
        check_quantized(record)
        if record.shape != self.shape:
            raise ValueError(f"the quantized weight has shape {record.shape}; expected (out, in) = {self.shape}")
        self.weight, self.absmax = record.packed, record.absmax
        self.offset, self.nested_absmax = record.offset, record.nested_absmax
        self._set_format(record)
        self._shared_with = ()

    def _set_format(self, record: Quantized4bit) -> None:
        self.quant_type, self.block_size, self.weight_dtype = record.quant_type, record.block_size, record.dtype

    def _format(self) -> str:
        return _format(self.quantized)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._shared_with:
            return
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
        elif strict and not self._shared_with:
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
