"""Training that knows of the rounding to 8 bits to come (arXiv 1712.05877), with straight-through gradients.

Letters: V rows of a table, D width.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from neural_layers.kernels.int8 import dequantize_rows, quantize_rows
from neural_layers.kernels.linear_int8 import linear_int8


def fake_quantize_rows(x: Tensor) -> Tensor:
    """Each row of x (…, n) rounded to 8 bits and back: round(127 x / m) · m / 127, m = max |row|, in the dtype of x.

    The gradient passes as if nothing were rounded (arXiv 1308.3432): no value lies outside the range, and the scale
    counts as a constant.
    """
    rounded: Tensor = _Rounded.apply(x)
    return rounded


class _Rounded(torch.autograd.Function):
    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return dequantize_rows(*quantize_rows(x), x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        pass

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Tensor:
        return grads[0]


class FakeQuantizedLinear(nn.Linear):
    """`nn.Linear` that computes as the `LinearInt8` made of it will, and trains.

    Weight rounded by a scale for each output, x by one for each row: the same numbers, multiplied as floats where a
    gradient is wanted, and by the very op of `LinearInt8` where none is (`torch.no_grad()`). The parameters are those
    of the layer that it was made of, under the same names: an optimizer that has them keeps them, and checkpoints fit
    the plain model.
    """

    @classmethod
    def from_linear(cls, linear: nn.Linear) -> "FakeQuantizedLinear":
        """A layer with the very parameters of `linear`."""
        layer = cls(linear.in_features, linear.out_features, bias=linear.bias is not None, device="meta")
        layer.weight, layer.bias = linear.weight, linear.bias
        return layer.train(linear.training)

    def dense_weight(self) -> Tensor:
        """The rounded weight, through which the gradient passes."""
        return fake_quantize_rows(self.weight)

    def forward(self, input: Tensor) -> Tensor:
        if not torch.is_grad_enabled():
            return linear_int8(input, *quantize_rows(self.weight), self.bias)
        return F.linear(fake_quantize_rows(input), self.dense_weight(), self.bias)


class FakeQuantizedEmbedding(nn.Embedding):
    """`nn.Embedding` whose lookups are rounded as those of the `EmbeddingInt8` made of it will be: (…) → (…, D)."""

    @classmethod
    def from_embedding(cls, embedding: nn.Embedding) -> "FakeQuantizedEmbedding":
        """A table that is the very parameter of `embedding`."""
        sizes = (embedding.num_embeddings, embedding.embedding_dim, embedding.padding_idx)
        layer = cls(*sizes, sparse=embedding.sparse, scale_grad_by_freq=embedding.scale_grad_by_freq, device="meta")
        layer.weight = embedding.weight
        return layer.train(embedding.training)

    def dense_weight(self) -> Tensor:
        """The rounded table, through which the gradient passes."""
        return fake_quantize_rows(self.weight)

    def forward(self, input: Tensor) -> Tensor:
        # Rows are rounded one by one, so those that are looked up suffice.
        return fake_quantize_rows(super().forward(input))
