"""What the row kernels of the losses share: the greatest logit and Σ exp of a row, in one pass.

Each thread keeps its own greatest logit and sum of some columns, and they meet at the end of the row, so that nothing
waits within the pass: two exponentials a logit and head, which take less time than its bytes.
"""

# mypy: allow-untyped-defs, allow-incomplete-defs

import triton
import triton.language as tl
from torch import Tensor

# Bytes of a row in a step.
STEP, WARPS = 8192, 8


@triton.jit
def exponential(x):
    """e^x by `tl.exp2`, which a GPU has as one instruction."""
    return tl.exp2(x * 1.4426950408889634)


@triton.jit
def first_greatest(BLOCK: tl.constexpr, ACC: tl.constexpr):
    """What the greatest logits start from: finite, so that a difference from it is a number."""
    return tl.full([BLOCK], -2e38, ACC)


@triton.jit
def add_logits(greatest, total, logits):
    """The greatest logits and Σ e^(s − greatest) with more of them; a logit −inf adds nothing.

    Returns them, e^(s − greatest), and the factor of what was summed before.
    """
    larger = tl.maximum(greatest, logits)
    factor = exponential(greatest - larger)
    weight = exponential(logits - larger)
    return larger, total * factor + weight, weight, factor


@triton.jit
def whole_row(greatest, total):
    """The greatest logit of the row and Σ e^(s − greatest), and the factor of what each thread has summed."""
    largest = tl.max(greatest, axis=0)
    factor = exponential(greatest - largest)
    return largest, tl.sum(total * factor, axis=0), factor


def block_of(logits_CV: Tensor) -> int:
    """Columns of a step."""
    return min(STEP // logits_CV.element_size(), triton.next_power_of_2(logits_CV.shape[1]))
