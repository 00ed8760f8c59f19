"""From a sequence to a vector.

Letters: B batch, T length, D width, H heads, K head width, Q learned queries.
"""

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from neural_layers.kernels.arguments import match_shapes
from neural_layers.kernels.flash_attention import flash_attention
from neural_layers.linear import Linear


def _check_mask(x_BTD: Tensor, mask: Tensor | None) -> None:
    match_shapes({"B": x_BTD.shape[0], "T": x_BTD.shape[1]}, "BT", mask=mask)


class AttentionPooling(nn.Module):
    """Learned queries attend over the sequence (the pooling of Set Transformer, arXiv 1810.00825).

    forward(x (B, T, D), mask (B, T), true or 1 for a token that counts) → (B, D) for one query, (B, Q, D) for more.
    A row without tokens gives the output projection of zeros.
    Raises ValueError where dim is not a multiple of num_heads, or a mask does not fit.
    """

    def __init__(self, dim: int, num_heads: int, num_queries: int = 1) -> None:
        super().__init__()
        if num_heads < 1 or dim % num_heads:
            raise ValueError(f"dim={dim} must be a multiple of num_heads={num_heads}, which is at least 1")
        self.num_heads, self.num_queries = num_heads, num_queries
        self.query = nn.Parameter(torch.randn(num_queries, dim) * dim**-0.5)
        self.kv_proj = Linear(dim, 2 * dim, bias=False)
        self.o_proj = Linear(dim, dim, bias=False)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        _check_mask(x, mask)
        k_BTHK, v_BTHK = rearrange(self.kv_proj(x), "b t (two h k) -> two b t h k", two=2, h=self.num_heads)
        q_BQHK = repeat(self.query.to(k_BTHK.dtype), "q (h k) -> b q h k", b=x.shape[0], h=self.num_heads)
        padding = None if mask is None else mask.bool()
        pooled_BQD = self.o_proj(flash_attention(q_BQHK, k_BTHK, v_BTHK, key_padding_mask=padding).flatten(2))
        return pooled_BQD.squeeze(1) if self.num_queries == 1 else pooled_BQD


class GeMPooling(nn.Module):
    """Generalised mean over T: (mean(max(x, eps)^p))^(1/p) (arXiv 1711.02512); p = 1 is the mean of the positive
    parts, p → ∞ the maximum.

    forward(x (B, T, D), mask (B, T), true or 1 for a token that counts) → (B, D). A row without tokens gives eps.
    Raises ValueError where p or eps is not positive, or a mask does not fit.
    """

    def __init__(self, p: float = 3.0, eps: float = 1e-6, learnable: bool = True) -> None:
        super().__init__()
        if p <= 0 or eps <= 0:
            raise ValueError(f"p={p} and eps={eps} must be positive")
        self.p = nn.Parameter(torch.tensor(float(p)), requires_grad=learnable)
        self.eps = eps

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        _check_mask(x, mask)
        if mask is None:
            mask = x.new_ones(x.shape[:2])
        # A masked token is set to eps before the power: NaN or garbage in it reaches neither value nor gradient.
        kept_BT1 = mask.bool().unsqueeze(-1)
        # float32 on purpose: cubes of half-precision values overflow and lose their digits.
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        clamped_BTD = torch.where(kept_BT1, wide, self.eps).clamp_min(self.eps)
        if x.shape[1] == 0:
            return torch.full_like(x[:, :0].sum(dim=1), self.eps)
        # Relative to the largest, or x^p overflows; the result does not depend on it, and so neither does the gradient.
        largest_B1D = clamped_BTD.detach().amax(dim=1, keepdim=True)
        powers_BTD = (clamped_BTD / largest_B1D).pow(self.p) * kept_BT1
        count_B1 = kept_BT1.sum(dim=1)
        mean_BD = powers_BTD.sum(dim=1) / count_B1.clamp_min(1)
        pooled_BD = torch.where(count_B1 > 0, mean_BD, 1.0).pow(1 / self.p) * largest_B1D.squeeze(1)
        return pooled_BD.to(x.dtype)
