"""Losses of output logits in chunks of tokens, in torch: any formula on any device.

The formula is given a few rows at a time, which lie in the cache: its passes over the logits cost little beside the
products (5 % at a width of 768), each of which is one matrix product for the whole chunk. A formula that is a kernel,
and makes one pass, is given the whole chunk.

Dimension letters: T tokens of all sequences, C tokens of a chunk, D width of a head, V vocabulary.
"""

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from neural_layers.kernels.arguments import accumulation_dtype
from neural_layers.kernels.chunked_loss import Head, empty_gradients, rows_of_chunk, spans

# Logits given to the formula at once: half a megabyte of float32.
_SLAB = 2**17
# Columns of a product with the weight, on the CPU and elsewhere: a block's packed weight stays in a CPU's cache, and is
# enough work for a GPU; half weights are widened by block.
_BLOCK, _BLOCK_ELSEWHERE = 1024, 8192

# formula(logits of each head (C, V), their tokens (C), which heads want a gradient) → losses (C).
# The gradient of each loss by its logits replaces them, for the heads that want one.
Formula = Callable[[list[Tensor], Tensor, list[bool]], Tensor]


def chunked_mean(
    heads: Sequence[Head],
    tokens: Tensor,
    formula: Formula,
    *,
    scale: float = 1.0,
    factor: float = 1.0,
    chunk_size: int | None = None,
    whole_chunks: bool = False,
) -> tuple[Tensor, list[Tensor]]:
    """factor · the mean of the formula over `tokens`, and its gradients by the heads' hidden states and weights.

    tokens: (N,) of int64, the tokens that count among the flattened hidden states; the others take no part at all.
    Returns the loss, NaN where no token counts, and two gradients for each head, with no elements where not wanted and
    zero where no token counts; all in the accumulation dtype, so that a loss scale can save gradients from underflow
    before they are rounded.
    """
    dtype = accumulation_dtype(*(tensor for head in heads for tensor in (head.hidden, head.weight_VD)))
    losses_N = torch.empty(len(tokens), dtype=dtype, device=tokens.device)
    vocabulary = len(heads[0].weight_VD)
    chunk = rows_of_chunk(chunk_size, tokens, vocabulary)
    share, slab = factor / max(1, len(tokens)), chunk if whole_chunks else max(1, _SLAB // vocabulary)
    # Inside autocast the products would otherwise be in half precision.
    with torch.autocast(tokens.device.type, enabled=False):
        products = [_Product(head, dtype, tokens, chunk, scale) for head in heads]
        wants = [head.wants_hidden or head.wants_weight for head in heads]
        for n0, n1 in spans(len(tokens), chunk):
            logits = [product.logits(tokens[n0:n1]) for product in products]
            for c0, c1 in spans(n1 - n0, slab):
                slabs = [logits_CV[c0:c1] for logits_CV in logits]
                losses_N[n0 + c0 : n0 + c1] = formula(slabs, tokens[n0 + c0 : n0 + c1], wants)
            for product, logits_CV in zip(products, logits, strict=True):
                product.accumulate(logits_CV, tokens[n0:n1], share)
    return losses_N.sum() / len(tokens) * factor, [grad for product in products for grad in product.gradients()]


def softmax_(logits_CV: Tensor) -> Tensor:
    """Overwrite logits with their softmax; returns log Σ exp (C, 1) of what they were."""
    # torch.softmax makes one pass through the cache for each row, and its exponential, unlike torch.exp, is as fast
    # for the far negative.
    greatest_C1 = logits_CV.amax(dim=1, keepdim=True)
    torch.softmax(logits_CV, dim=1, out=logits_CV)
    return greatest_C1 - logits_CV.amax(dim=1, keepdim=True).log_()


class _Product:
    """One head at work: the logits of a chunk in one buffer for all chunks, and its gradients in the making."""

    def __init__(self, head: Head, dtype: torch.dtype, tokens: Tensor, chunk: int, scale: float) -> None:
        self.head, self.dtype, self.scale = head, dtype, scale
        self.hidden_TD = head.hidden.reshape(-1, head.hidden.shape[-1])
        self.buffer_CV = head.hidden.new_empty(chunk, len(head.weight_VD), dtype=dtype)
        self.grad_hidden_TD, self.grad_weight_VD = empty_gradients(head, tokens, dtype)
        self.is_first = True

    def logits(self, rows_C: Tensor) -> Tensor:
        """scale · hidden @ weight.T of these tokens."""
        self.chunk_CD = self.hidden_TD.index_select(0, rows_C).to(self.dtype).mul_(self.scale)
        logits_CV = self.buffer_CV[: len(rows_C)]
        for v0, v1 in self._blocks():
            torch.mm(self.chunk_CD, self._weight(v0, v1).T, out=logits_CV[:, v0:v1])
        return logits_CV

    def accumulate(self, grad_CV: Tensor, rows_C: Tensor, share: float) -> None:
        """Carry share · the gradient of the logits on to the hidden states and into the weight's gradient."""
        if self.head.wants_hidden:
            grad_CD = torch.zeros_like(self.chunk_CD)
            for v0, v1 in self._blocks(whole=self.head.weight_VD.dtype == self.dtype):
                grad_CD.addmm_(grad_CV[:, v0:v1], self._weight(v0, v1))
            self.grad_hidden_TD.index_copy_(0, rows_C, grad_CD.mul_(share * self.scale))
        if self.head.wants_weight:
            beta = 0.0 if self.is_first else 1.0
            self.grad_weight_VD.addmm_(grad_CV.T, self.chunk_CD.mul_(share), beta=beta)
        self.is_first = False

    def gradients(self) -> tuple[Tensor, Tensor]:
        """The gradients of the hidden states, in their shape, and of the weight."""
        shape = self.head.hidden.shape if self.head.wants_hidden else (0,)
        return self.grad_hidden_TD.view(shape), self.grad_weight_VD

    def _blocks(self, whole: bool = False) -> Iterator[tuple[int, int]]:
        vocabulary = len(self.head.weight_VD)
        block = _BLOCK if self.buffer_CV.device.type == "cpu" else _BLOCK_ELSEWHERE
        return spans(vocabulary, vocabulary if whole else block)

    def _weight(self, v0: int, v1: int) -> Tensor:
        return self.head.weight_VD[v0:v1].to(self.dtype)
