"""What modules of quantized weights have in common: buffers whose dtype nobody changes."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from neural_layers.kernels.prepared import Prepared, Tensors

Layer = TypeVar("Layer", bound="FrozenBits")


class FrozenBits(nn.Module):
    """A module with quantized weights in buffers that move between devices and that no `.to(dtype)`, `.half()` or
    `.double()` changes: a cast scale would be another weight.

    `bits` names these buffers. Two modules may share them, as a head and its embedding do (`_share`): they stay one
    through `.to(device)`, `copy.deepcopy` of both and `load_state_dict` without `assign`. Loading refuses tensors of
    another dtype or shape by name, and then leaves the module's own.
    """

    bits: tuple[str, ...]
    # Those that two layers of one weight do not have in common.
    own_bits: tuple[str, ...] = ()
    weight: Tensor
    # In a tuple, because a module as an attribute would be a child, and its bits would be saved twice.
    _shared_with: "tuple[FrozenBits, ...]" = ()
    _prepared: Prepared | None = None

    def _quick(self, x: Tensor) -> Tensor | None:
        """The layer's result in the plain case of rows on the CPU, or None where the op has to be asked."""
        if torch.compiler.is_compiling() or not x.is_cpu:
            return None
        own = self._buffers
        tensors = (*[own[name] for name in self.bits], self._parameters.get("bias"))
        prepared = self._prepared
        if prepared is None or not prepared.holds(tensors):
            prepared = self._prepared = self._prepare(tensors)
        return None if prepared is None else prepared(x)

    def _prepare(self, tensors: Tensors) -> Prepared | None:
        """The C kernel for these bits and this bias, checked, where there is one."""
        return None

    def _share(self, other: "FrozenBits", kind: "type[FrozenBits]") -> None:
        """Take over the very buffers of `other`, and keep to them."""
        if not isinstance(other, kind):
            raise TypeError(f"the embedding is a {type(other).__name__}; expected an {kind.__name__}")
        if self.shape != other.shape:
            raise ValueError(f"the embedding is {other.shape}; expected {self.shape}, as the layer's weight (out, in)")
        if self.weight.device != other.weight.device:
            raise ValueError(f"the embedding lies on {other.weight.device}; expected {self.weight.device}")
        self._shared_with = (other,)
        self._adopt()

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the weight that the bits stand for."""
        raise NotImplementedError

    def _adopt(self) -> None:
        for other in self._shared_with:
            own, theirs = self._buffers.get(self.bits[0]), other._buffers[other.bits[0]]
            if own is None or theirs is None or own.device == theirs.device:
                for name in self._common_bits():
                    self._buffers[name] = other._buffers[name]

    def _common_bits(self) -> list[str]:
        """The bits that are those of the module that this one shares its weight with."""
        return [name for other in self._shared_with for name in other.bits if name not in self.own_bits]

    def _apply(self: Layer, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Layer:
        before = {name: self._buffers[name] for name in self.bits}
        super()._apply(fn, recurse)
        for name, tensor in before.items():
            after = self._buffers[name]
            # Another device is taken over, another dtype is not.
            if tensor is not None and after is not None and after.dtype != tensor.dtype:
                # Not `tensor.to(device)`, which has no data to copy from or to the meta device.
                moved = tensor.device == after.device
                empty = torch.empty_like(tensor, device=after.device)
                self._buffers[name] = tensor if moved else empty if tensor.is_meta else tensor.to(after.device)
        self._adopt()
        return self

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self._shared_with:
            # They are in the state of the module that they belong to, and a file holds them once.
            for name in self._common_bits():
                destination.pop(prefix + name, None)

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
        state, wrong = dict(state_dict), False
        if self._shared_with:
            self._adopt()
            names = set(self._common_bits()) - self._non_persistent_buffers_set
            state = {prefix + name: self._buffers[name] for name in names} | state
        for name in self.bits:
            own, given = self._buffers[name], state.get(prefix + name)
            if own is not None and given is not None and (given.dtype != own.dtype or given.shape != own.shape):
                error_msgs.append(
                    f"{prefix}{name}: it is {given.dtype} {tuple(given.shape)}; the layer was built for {own.dtype} "
                    f"{tuple(own.shape)}" + (_REMEDY if given.is_floating_point() > own.is_floating_point() else "")
                )
                wrong = True
        if wrong:
            # All bits or none: codes with the scales of others would be another weight.
            state |= {prefix + name: self._buffers[name] for name in self.bits if prefix + name in state}
        arguments = (local_metadata, strict, missing_keys, unexpected_keys, error_msgs)
        super()._load_from_state_dict(state, prefix, *arguments)


_REMEDY = ". The weight is not quantized; load it into the plain layer, and make this one of that"


def check_finite(scale: Tensor) -> None:
    """Raise ValueError for scales of a weight with NaN or infinity."""
    if not scale.is_meta and not scale.isfinite().all():
        raise ValueError("the weight holds NaN or infinity, which have no levels; mend it before it is quantized")
