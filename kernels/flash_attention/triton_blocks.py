"""The blocks of the Triton kernels of attention, for each kind of GPU: the largest that spill no registers.

Compiled ahead of time for sm_80, sm_90, sm_100 and gfx942 with every option of attention (`make aot`).
"""

from typing import NamedTuple

import torch

from neural_layers.kernels.triton_support import interpreting

# The smallest side of a matrix product.
LEAST = 16


class Blocks(NamedTuple):
    """How a kernel cuts its work.

    own:    rows (or keys) of a program
    met:    keys (or rows) that it meets at a time
    chunk:  columns that are multiplied at a time
    """

    own: int
    met: int
    chunk: int
    warps: int
    stages: int


# (kind of GPU, columns) → for half precision: forward, gradients of queries, gradients of keys and values. The matrix
# units of sm_90 take 64 rows at a time, those of sm_100 up to 128 and keep sums in a memory of their own.
_WHOLE = 256
_HALF = {
    ("sm_90", 64): (
        Blocks(128, 64, _WHOLE, 8, 3), Blocks(128, 64, _WHOLE, 8, 2), Blocks(128, 64, _WHOLE, 8, 2),
    ),
    ("sm_90", 128): (
        Blocks(128, 64, _WHOLE, 8, 3), Blocks(128, 32, _WHOLE, 8, 2), Blocks(128, 32, _WHOLE, 8, 2),
    ),
    ("sm_90", 256): (
        Blocks(64, 32, _WHOLE, 8, 2), Blocks(32, 16, _WHOLE, 8, 2), Blocks(32, 16, _WHOLE, 8, 2),
    ),
    ("sm_100", 64): (
        Blocks(128, 64, _WHOLE, 8, 3), Blocks(128, 64, _WHOLE, 8, 2), Blocks(128, 64, _WHOLE, 8, 2),
    ),
    ("sm_100", 128): (
        Blocks(128, 64, _WHOLE, 8, 3), Blocks(64, 32, _WHOLE, 8, 2), Blocks(128, 64, _WHOLE, 8, 2),
    ),
    ("sm_100", 256): (
        Blocks(64, 32, _WHOLE, 8, 2), Blocks(64, 32, _WHOLE, 8, 2), Blocks(32, 16, _WHOLE, 8, 2),
    ),
    ("sm_80", 64): (
        Blocks(128, 64, _WHOLE, 8, 3), Blocks(128, 32, _WHOLE, 8, 2), Blocks(64, 32, _WHOLE, 4, 2),
    ),
    ("sm_80", 128): (
        Blocks(128, 32, _WHOLE, 8, 3), Blocks(64, 32, _WHOLE, 8, 2), Blocks(64, 32, _WHOLE, 8, 2),
    ),
    ("sm_80", 256): (
        Blocks(64, 16, _WHOLE, 8, 2), Blocks(32, 16, _WHOLE, 8, 2), Blocks(32, 16, _WHOLE, 8, 2),
    ),
    ("gfx9", 64): (
        Blocks(128, 64, _WHOLE, 8, 2), Blocks(64, 64, _WHOLE, 4, 2), Blocks(64, 32, _WHOLE, 4, 2),
    ),
    ("gfx9", 128): (
        Blocks(128, 32, _WHOLE, 4, 2), Blocks(64, 32, _WHOLE, 4, 2), Blocks(64, 32, _WHOLE, 4, 2),
    ),
    ("gfx9", 256): (
        Blocks(64, 32, _WHOLE, 4, 2), Blocks(32, 16, _WHOLE, 4, 2), Blocks(32, 16, _WHOLE, 4, 2),
    ),
}  # fmt: skip
# Without matrix units, for up to so many columns.
_FLOAT32 = {
    128: (Blocks(64, 16, 16, 4, 1), Blocks(32, 16, 32, 8, 1), Blocks(32, 16, 32, 8, 1)),
    256: (Blocks(32, 16, 16, 4, 1), Blocks(16, 16, 64, 4, 1), Blocks(16, 16, 32, 8, 1)),
}
_FLOAT64 = {
    64: (Blocks(32, 16, 32, 4, 1), Blocks(32, 16, 32, 4, 1), Blocks(32, 16, 32, 4, 1)),
    128: (Blocks(32, 16, 16, 8, 1), Blocks(32, 16, 16, 8, 1), Blocks(16, 16, 16, 8, 1)),
    256: (Blocks(16, 16, 16, 8, 1), Blocks(16, 16, 16, 8, 1), Blocks(16, 16, 16, 8, 1)),
}


def blocks_for(dtype: torch.dtype, width: int, kernel: int, count: int) -> Blocks:
    """The blocks of a kernel: 0 forward, 1 gradients of queries, 2 gradients of keys and values.

    width: columns, the wider of K and V, filled up to a power of two
    count: rows (or keys) there are in all
    """
    if dtype.itemsize > 2:
        table = _FLOAT64 if dtype == torch.float64 else _FLOAT32
        blocks = table[min(most for most in table if width <= most)][kernel]
    else:
        blocks = _HALF[_kind(), max(64, width)][kernel]
    return blocks._replace(own=max(LEAST, min(blocks.own, 1 << max(count - 1, 0).bit_length())))


def _kind() -> str:
    """The kind of GPU that kernels are compiled for; those that are not named here have the matrix units of sm_80."""
    if interpreting():
        return "sm_80"
    from triton.runtime import driver

    target = driver.active.get_current_target()
    if target.backend == "hip":
        return "gfx9"
    return {9: "sm_90", 10: "sm_100"}.get(target.arch // 10, "sm_80")
