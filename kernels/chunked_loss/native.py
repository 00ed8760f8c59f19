"""Losses of output logits in chunks of tokens, in C (native.c): the formulas that it knows.

The logits stand as (V, C) here, the vocabulary first. C makes them together with statistics of each block of the
vocabulary; these are combined here, in float64, into each token's loss and what its gradient needs; then C turns the
logits into their gradient on the way into the products.

Dimension letters: T tokens of all sequences, C tokens of a chunk (padded, where tensors go to C), D width of a head,
V vocabulary, J blocks of the vocabulary.
"""

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from neural_layers.kernels import c_library
from neural_layers.kernels.arguments import accumulation_dtype
from neural_layers.kernels.chunked_loss import Head, empty_gradients, rows_of_chunk, spans

# As in native.c: the vocabulary of a block, the statistics of one, and the rows of the weight at a time (the most).
_BLOCK, STATISTICS, _ROWS = 96, 5, 12
# Tokens are padded to the columns of the widest registers.
_COLUMNS = 32


def native_avoid(*args: Any, **kwargs: Any) -> str | None:
    """Why `auto` passes the C losses over, or None: most of a loss are products, which need wide registers."""
    if c_library.VARIANT == "baseline":
        return "products in C are slower than those of torch without AVX2 or AVX-512"
    return None


@dataclass(frozen=True)
class Formula:
    """A formula that native.c knows.

    code:     its number there
    combine:  (statistics of the blocks (J, STATISTICS, C) in float64, each head's logits (V, C), tokens (C)) → their
              losses (C), and what the gradient needs (STATISTICS, C): the statistics of the whole vocabulary, the sums
              inverted
    target_T: int64, where the formula has one
    floor, peak: what cross-entropy's gradient subtracts everywhere, and at the target
    """

    code: int
    combine: Callable[[Tensor, list[Tensor], Tensor], tuple[Tensor, Tensor]]
    target_T: Tensor | None = None
    floor: float = 0.0
    peak: float = 0.0


class _CHead(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("weight", "hidden", "logits", "grad_weight", "grad_hidden")),
        *((name, ctypes.c_int64) for name in ("width", "dtype", "add")),
    ]


class _CChunk(ctypes.Structure):
    _fields_ = [
        ("heads", _CHead * 2),
        *((name, ctypes.c_int64) for name in ("count", "formula", "vocabulary", "tokens", "threads", "stride")),
        *((name, ctypes.c_void_p) for name in ("statistics", "rows", "target")),
        *((name, ctypes.c_double) for name in ("floor", "peak")),
    ]


def chunked_mean(
    heads: Sequence[Head],
    tokens: Tensor,
    formula: Formula,
    *,
    scale: float = 1.0,
    factor: float = 1.0,
    chunk_size: int | None = None,
) -> tuple[Tensor, list[Tensor]]:
    """factor · the mean of the formula over `tokens`, and its gradients, as `pytorch.chunked_mean` gives them."""
    dtype = accumulation_dtype(*(tensor for head in heads for tensor in (head.hidden, head.weight_VD)))
    chunk = rows_of_chunk(chunk_size, tokens, len(heads[0].weight_VD))
    products = [_Product(head, dtype, tokens, chunk, scale) for head in heads]
    losses_N, share = tokens.new_empty(len(tokens), dtype=dtype), factor / max(1, len(tokens))
    for n0, n1 in spans(len(tokens), chunk):
        losses_N[n0:n1] = _run(products, tokens[n0:n1], formula, share)
    gradients = [gradient for product in products for gradient in product.gradients()]
    return losses_N.sum() / len(tokens) * factor, gradients


def _run(products: list["_Product"], rows_C: Tensor, formula: Formula, share: float) -> Tensor:
    """The losses of a chunk, its gradients added to those of the products."""
    vocabulary, dtype, tokens = products[0].vocabulary, products[0].dtype, len(rows_C)
    stride = -(-tokens // _COLUMNS) * _COLUMNS
    statistics = rows_C.new_empty(-(-vocabulary // _BLOCK), STATISTICS, stride, dtype=dtype)
    target_C = None if formula.target_T is None else formula.target_T[rows_C]
    call = _CChunk(
        count=len(products),
        formula=formula.code,
        vocabulary=vocabulary,
        tokens=tokens,
        threads=torch.get_num_threads(),
        stride=stride,
        statistics=statistics.data_ptr(),
        target=None if target_C is None else target_C.data_ptr(),
        floor=formula.floor * share,
        peak=formula.peak * share,
    )
    for i, product in enumerate(products):
        product.start(call.heads[i], rows_C, stride)
    c_library.function("chunked_loss_logits", dtype)(call)
    logits = [product.logits_VC(stride)[:, :tokens] for product in products]
    losses_C, whole = formula.combine(statistics[:, :, :tokens].double(), logits, rows_C)
    if any(product.wants_gradient for product in products):
        rows = torch.zeros(STATISTICS, stride, dtype=dtype)
        rows[:, :tokens] = whole
        rows[1::2] *= share
        call.rows = rows.data_ptr()
        c_library.function("chunked_loss_gradients", dtype)(call)
        for product in products:
            product.finish(rows_C)
    return losses_C


class _Product:
    """One head: the buffer of its logits, and its gradients in the making."""

    def __init__(self, head: Head, dtype: torch.dtype, tokens: Tensor, chunk: int, scale: float) -> None:
        self.head, self.dtype, self.scale = head, dtype, scale
        self.weight_VD = head.weight_VD.contiguous()
        self.vocabulary, self.width = self.weight_VD.shape
        self.wants_gradient = head.wants_hidden or head.wants_weight
        self.hidden_TD = head.hidden.reshape(-1, self.width)
        padded = -(-chunk // _COLUMNS) * _COLUMNS
        self.buffer = tokens.new_empty((self.vocabulary + _ROWS) * padded, dtype=dtype)
        self.grad_hidden_TD, self.grad_weight_VD = empty_gradients(head, tokens, dtype)
        self.is_first = True

    def logits_VC(self, stride: int) -> Tensor:
        return self.buffer[: self.vocabulary * stride].view(self.vocabulary, stride)

    def start(self, call: _CHead, rows_C: Tensor, stride: int) -> None:
        """Fill in the call for these tokens."""
        self.chunk_CD = self.hidden_TD.index_select(0, rows_C).to(self.dtype).mul_(self.scale)
        self.grad_CD = torch.empty_like(self.chunk_CD)
        call.weight, call.dtype = self.weight_VD.data_ptr(), c_library.code(self.weight_VD, self.dtype)
        call.hidden, call.logits, call.width = self.chunk_CD.data_ptr(), self.buffer.data_ptr(), self.width
        call.grad_weight = self.grad_weight_VD.data_ptr() if self.head.wants_weight else None
        call.grad_hidden = self.grad_CD.data_ptr() if self.head.wants_hidden else None
        call.add = not self.is_first
        self.is_first = False

    def finish(self, rows_C: Tensor) -> None:
        """Store the gradient of these tokens."""
        if self.head.wants_hidden:
            self.grad_hidden_TD.index_copy_(0, rows_C, self.grad_CD.mul_(self.scale))

    def gradients(self) -> tuple[Tensor, Tensor]:
        """The gradients of the hidden states, in their shape, and of the weight."""
        shape = self.head.hidden.shape if self.head.wants_hidden else (0,)
        return self.grad_hidden_TD.view(shape), self.grad_weight_VD
