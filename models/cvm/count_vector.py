"""Count-Vector-Merge: a lexical summary of the source, merged into the encoder's states.

Letters: B batch, S source length, V vocabulary, D width.
"""

import torch
from torch import Tensor, nn

from neural_layers.linear import Linear
from neural_layers.norm import RMSNorm


def count_vector(input_ids_BS: Tensor, attention_mask_BS: Tensor, vocab_size: int) -> Tensor:
    """How often each token occurs in each source, padding left out: (B, V), integer."""
    counts_BV = torch.zeros(input_ids_BS.shape[0], vocab_size, dtype=torch.long, device=input_ids_BS.device)
    return counts_BV.scatter_add(1, input_ids_BS, attention_mask_BS.long())


class CountVectorMerge(nn.Module):
    """states + gate · proj(norm(Σ_v log(1 + count_v) · embedding_v)), the same for every position.

    `gate` (D,) begins at zero, so that a new model equals the one without the merge.

    forward(states (B, S, D), embedded (B, S, D), input_ids (B, S), attention_mask (B, S), vocab_size) → (B, S, D).
    `embedded` are the embeddings of `input_ids`. The sum over the vocabulary runs over the source's tokens alone: each
    of a token's `count` occurrences adds log(1 + count) / count of its embedding.
    """

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.norm = RMSNorm(dim, eps)
        self.proj = Linear(dim, dim, bias=False)
        self.gate = nn.Parameter(torch.zeros(dim))

    def forward(
        self, states: Tensor, embedded: Tensor, input_ids: Tensor, attention_mask: Tensor, vocab_size: int
    ) -> Tensor:
        count_BS = count_vector(input_ids, attention_mask, vocab_size).gather(1, input_ids).to(embedded.dtype)
        weight_BS = torch.log1p(count_BS) / count_BS.clamp_min(1) * attention_mask.to(embedded.dtype)
        summary_B1D = weight_BS.unsqueeze(1) @ embedded
        return states + self.gate * self.proj(self.norm(summary_B1D))
