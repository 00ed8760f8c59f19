"""Functions that Triton kernels share."""

# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(−x)).

    By `tl.exp2`, which a GPU has as one instruction; `tl.exp` guards its denormal results with three more.
    """
    return 1 / (1 + tl.exp2(x * -1.4426950408889634))
