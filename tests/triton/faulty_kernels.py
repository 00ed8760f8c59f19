"""Kernels with faults that the tests must find, and small ones for the interpreter itself."""

import triton
import triton.language as tl


@triton.jit
def copy(x, out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at).to(tl.float32))


@triton.jit
def copy_where(x, out, wanted, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at), (wanted > 0) & (at < BLOCK))


@triton.jit
def double(x, out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)
    tl.store(out + at, tl.load(x + at) * 2)


@triton.jit
def total(x, out, BLOCK: tl.constexpr):
    tl.store(out, tl.sum(tl.load(x + tl.arange(0, BLOCK))))


@triton.jit
def outer_products(x, out, BLOCK: tl.constexpr):
    """Keeps far more than a thread has registers, so that they spill."""
    at = tl.arange(0, BLOCK)
    kept = tl.load(x + at[:, None] * BLOCK + at[None, :])
    more = tl.load(x + at[None, :] * BLOCK + at[:, None])
    for _ in range(BLOCK):
        kept, more = kept * more + 1, more * tl.sum(kept * more) + kept
    tl.store(out + at[:, None] * BLOCK + at[None, :], kept + more)


@triton.jit
def sum_of_a_pointer(x, out, BLOCK: tl.constexpr):
    """Does not compile."""
    tl.store(out, tl.sum(x + tl.arange(0, BLOCK)))
