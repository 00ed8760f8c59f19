"""Limits that no implementation can beat, as calls to be timed beside the contenders."""

from collections.abc import Callable
from typing import Any

import torch

from neural_layers.benchmarks.case import Inputs, Limit

Run = Callable[[], Any]
_SIDE, _ROWS = 512, 2048  # of the matrix products that stand for any others: large enough to run at full rate


def copy_limit(forward: Callable[[Inputs], float], both: Callable[[Inputs], float] | None = None) -> Limit:
    """The time to copy as many bytes as the op must read and write at least.

    forward, both: those bytes for the op's inputs; both is forward + backward
    """

    def prepare(inputs: Inputs) -> tuple[Run | None, Run | None]:
        device = _device(inputs)
        return _copy(forward(inputs), device), None if both is None else _copy(both(inputs), device)

    return Limit("copying the same bytes", prepare)


def product_limit(forward: Callable[[Inputs], float], both: Callable[[Inputs], float] | None = None) -> Limit:
    """The time of matrix products with as many multiplications, in the dtype of the inputs.

    forward, both: the number of multiplications for the op's inputs; both is forward + backward
    """

    def prepare(inputs: Inputs) -> tuple[Run | None, Run | None]:
        first = next(value for value in inputs.values() if isinstance(value, torch.Tensor))
        return _products(forward(inputs), first), None if both is None else _products(both(inputs), first)

    return Limit("its matrix products alone", prepare)


def bytes_of(inputs: Inputs, *names: str) -> float:
    """The bytes of these tensors together; a tensor that is named twice counts twice."""
    return float(sum(inputs[name].numel() * inputs[name].element_size() for name in names))


def _copy(bytes_moved: float, device: torch.device) -> Run:
    """Half of the bytes are read and half are written."""
    source = torch.zeros(max(1, int(bytes_moved / 8)), dtype=torch.float32, device=device)
    target = torch.ones_like(source)
    return lambda: target.copy_(source)


def _products(multiplications: float, like: torch.Tensor) -> Run:
    rows = multiplications / _SIDE**2
    whole, rest = divmod(int(rows), _ROWS)
    matrix = torch.ones(_SIDE, _SIDE, dtype=like.dtype, device=like.device)
    large, small = like.new_ones(_ROWS, _SIDE).detach(), like.new_ones(max(rest, 1), _SIDE).detach()
    out_large, out_small = torch.empty_like(large), torch.empty_like(small)

    @torch.no_grad()
    def run() -> None:
        for _ in range(whole):
            torch.mm(large, matrix, out=out_large)
        torch.mm(small, matrix, out=out_small)

    return run


def _device(inputs: Inputs) -> torch.device:
    value = next(iter(inputs.values()))
    return (value if isinstance(value, torch.Tensor) else value.packed).device  # a 4-bit record holds tensors
