"""Checks and dtype rules that the ops share."""

import torch
import torch.nn.functional
from torch import Tensor

FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def match_shapes(sizes: dict[str, int], layout: str, **tensors: Tensor | None) -> None:
    """Check tensors against a layout of dimension letters, and bind letters seen for the first time.

        sizes: dict[str, int] = {}
        match_shapes(sizes, "BTE", u=u, delta=delta)   # binds B, T, E from u; delta must agree
        match_shapes(sizes, "EN", A=A)                 # E is known, N is bound

    None stands for an optional tensor left out. Raises ValueError with the shape found and the one expected.
    """
    for name, tensor in tensors.items():
        if tensor is None:
            continue
        fits = tensor.ndim == len(layout) and all(
            sizes.get(letter, size) == size for letter, size in zip(layout, tensor.shape, strict=True)
        )
        if not fits:
            known = ", ".join(f"{letter}={sizes[letter]}" for letter in layout if letter in sizes)
            expected = f"({', '.join(layout)})" + (f" with {known}" if known else "")
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}; expected {expected}")
        for letter, size in zip(layout, tensor.shape, strict=True):
            sizes.setdefault(letter, size)


def check_floats(**tensors: Tensor | None) -> None:
    """Raise TypeError for a tensor that is not float64, float32, bfloat16 or float16."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.dtype not in FLOATS:
            raise TypeError(f"{name} has dtype {tensor.dtype}; expected one of {', '.join(map(str, FLOATS))}")


def check_devices(**tensors: Tensor | None) -> None:
    """Raise ValueError where the tensors lie on different devices."""
    devices = {name: tensor.device for name, tensor in tensors.items() if tensor is not None}
    if len(set(devices.values())) > 1:
        raise ValueError("tensors lie on different devices: " + ", ".join(f"{n} on {d}" for n, d in devices.items()))


def check_seq_idx(seq_idx: Tensor | None, batch: int, length: int) -> None:
    """Raise for a `seq_idx` that is not an integer tensor (batch, length)."""
    if seq_idx is None:
        return
    if seq_idx.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"seq_idx has dtype {seq_idx.dtype}; expected torch.int32 or torch.int64")
    if seq_idx.shape != (batch, length):
        raise ValueError(f"seq_idx has shape {tuple(seq_idx.shape)}; expected (B, T) = ({batch}, {length})")


def document_numbers(seq_idx_BS: Tensor) -> Tensor:
    """Number the documents of each row 0, 1, 2, … : one begins wherever the id changes, also to an id seen before."""
    begins_BS = torch.nn.functional.pad(seq_idx_BS[:, 1:] != seq_idx_BS[:, :-1], (1, 0))
    return begins_BS.cumsum(dim=1)[:, : seq_idx_BS.shape[1]]


def accumulation_dtype(*tensors: Tensor | None) -> torch.dtype:
    """The dtype in which states and sums are kept: float64 where an input is float64, otherwise float32."""
    has_float64 = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if has_float64 else torch.float32
