"""Running an op's Triton backend on the device of the test, wherever the arguments were made."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from tests.op_checks import non_contiguous


def on(device: str, op: Callable[..., Any]) -> Callable[..., Any]:
    """`op` with its tensors moved to the device, as contiguous or not as they were, and its results moved back.

    For the comparisons of `tests/op_checks.py`, whose tensors are on the CPU.
    """

    def move(value: Tensor) -> Tensor:
        moved = value.to(device)
        return moved if value.is_contiguous() or device == "cpu" else non_contiguous(moved)

    def call(*args: Any, **kwargs: Any) -> Any:
        moved_args, moved_kwargs = tree_map_only(Tensor, move, (args, kwargs))
        return tree_map_only(Tensor, torch.Tensor.cpu, op(*moved_args, **moved_kwargs))

    return call
