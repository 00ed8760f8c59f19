"""Scores and dropout of one block, computed alike in the forward and in the backward pass.

Dimension letters: B batch, T query length, S key length, G key/value heads, M query heads that share one of them,
K head width, t and s the queries and keys of a block. Rows are queries with their M heads, (query, head) in order,
so that all the heads of a block are one batched product.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from neural_layers.kernels.arguments import accumulation_dtype
from neural_layers.kernels.flash_attention.blocks import Block, Visibility, key_blocks

_SEED_RANGE = 2**63 - 1
# Scores are kept in units of ln 2, for exp2: torch.exp on the CPU is 20 to 200 times slower below −87 and at −inf.
LOG2_E = math.log2(math.e)
# Weights below this become 0: products with denormal numbers are 200 times slower, and ALiBi makes many.
_NEGLIGIBLE = {torch.float32: 2.0**-90, torch.float64: 2.0**-900}


@dataclass(frozen=True)
class Settings:
    """The numbers among the arguments, `scale` filled in."""

    causal: bool
    window: int | None
    scale: float
    softcap: float | None
    dropout_p: float
    chunk_size: int | None


def rows(x_BTHK: Tensor, kv_heads: int, dtype: torch.dtype) -> Tensor:
    """(B, T, G·M, K) as contiguous rows (B·G, T·M, K) of `dtype`; for keys and values M is 1."""
    B, T, H, K = x_BTHK.shape
    x_BGTMK = x_BTHK.reshape(B, T, kv_heads, H // kv_heads, K).transpose(1, 2)
    return x_BGTMK.to(dtype).contiguous().view(B * kv_heads, T * H // kv_heads, K)


def heads(x_rows: Tensor, like_BTHK: Tensor, kv_heads: int) -> Tensor:
    """The inverse of `rows`: contiguous (B, T, H, …) in the dtype of `like_BTHK`."""
    B, T, H, _ = like_BTHK.shape
    x_BTGMK = x_rows.view(B, kv_heads, T, H // kv_heads, x_rows.shape[-1]).transpose(1, 2)
    return x_BTGMK.to(like_BTHK.dtype).contiguous().view(B, T, H, x_rows.shape[-1])


def default_chunk(heads_in_all: int) -> int:
    """The length of a block of queries and of keys where the caller leaves it open; `heads_in_all` is B·H.

    Measured with K = 64: up to 64 heads 128 is best; with 96 and 256 heads 64 is 10 to 35 % faster, because the scores
    of a block stay in the cache.
    """
    return 128 if heads_in_all <= 64 else 64


@dataclass
class Scores:
    """The scores of one block, and what its backward pass needs of it."""

    score: Tensor  # (B·G, t·M, s), −inf where hidden
    cap_slope: Tensor | None  # d score / d uncapped score


class Tiles:
    """q, k, v as rows in the accumulation dtype, with everything that decides a score.

    q_rows: (B·G, T·M, K), times scale; k_rows: (B·G, S, K); v_rows: (B·G, S, V)
    """

    def __init__(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        alibi_slopes: Tensor | None,
        key_padding_mask: Tensor | None,
        seq_idx: Tensor | None,
        seed: Tensor | None,
        settings: Settings,
    ) -> None:
        self.B, self.T, self.H, _ = q.shape
        self.S, self.G = k.shape[1:3]
        self.M = self.H // self.G
        self.settings = settings
        self.dtype, self.device = accumulation_dtype(q), q.device
        self.q_unit = LOG2_E if settings.softcap is None else 1.0  # tanh needs the score itself
        self.q_rows = rows(q, self.G, self.dtype) * (settings.scale * self.q_unit)
        self.k_rows = rows(k, self.G, self.dtype)
        self.v_rows = rows(v, self.G, self.dtype)
        self.rule = Visibility(self.T, self.S, settings.causal, settings.window, key_padding_mask, seq_idx)
        self.inside = self.rule.without_positions()
        self.chunk = settings.chunk_size or default_chunk(self.B * self.H)
        self.slopes = None if alibi_slopes is None else alibi_slopes.to(self.dtype) * LOG2_E
        self.seed_value = 0 if seed is None else int(seed.item())

    def query_blocks(self) -> Iterator[tuple[int, int, slice]]:
        """The bounds of each block of queries, and its rows."""
        for t0 in range(0, self.T, self.chunk):
            t1 = min(t0 + self.chunk, self.T)
            yield t0, t1, slice(t0 * self.M, t1 * self.M)

    def key_blocks(self, t0: int, t1: int) -> Iterator[tuple[Block, slice]]:
        """The blocks that queries t0…t1 visit, and the rows of their keys."""
        for block in key_blocks(self.rule, t0, t1, self.chunk):
            yield block, slice(block.s0, block.s1)

    def split(self, tile: Tensor, block: Block) -> Tensor:
        """View (B·G, t·M, s) as (B, G, t, M, s)."""
        return tile.view(self.B, self.G, block.t1 - block.t0, self.M, block.s1 - block.s0)

    def scores(self, block: Block, for_backward: bool = False) -> Scores:
        """softcap(scale · q·k) − slope·|distance|, −inf where hidden."""
        q_rows = self.q_rows[:, block.t0 * self.M : block.t1 * self.M]
        score = torch.bmm(q_rows, self.k_rows[:, block.s0 : block.s1].mT)
        cap_slope, softcap = None, self.settings.softcap
        if softcap is not None:
            score.div_(softcap).tanh_()
            cap_slope = 1 - score * score if for_backward else None
            score.mul_(softcap * LOG2_E)
        if self.slopes is not None:
            slopes = self.slopes.view(self.G, 1, self.M, 1)
            self.split(score, block).addcmul_(slopes, self.distance(block), value=-1)
        rule = self.inside if block.full else self.rule
        allowed = rule.allowed(block.t0, block.t1, block.s0, block.s1, self.device)
        if allowed is not None:
            hidden = allowed.logical_not().unsqueeze(1).unsqueeze(3)  # (B, 1, t, 1, s)
            self.split(score, block).masked_fill_(hidden, float("-inf"))
        return Scores(score, cap_slope)

    def weights(self, score: Tensor, shift: Tensor) -> Tensor:
        """exp2(score − shift), in place of the scores."""
        weight = score.sub_(shift.unsqueeze(-1)).exp2_()
        return weight if self.slopes is None else torch.threshold_(weight, _NEGLIGIBLE[self.dtype], 0.0)

    def distance(self, block: Block) -> Tensor:
        """|position of the query − position of the key|, (t, 1, s); whole numbers, so exact."""
        query = torch.arange(block.t0, block.t1, device=self.device) + (self.S - self.T)
        key = torch.arange(block.s0, block.s1, device=self.device)
        return (query.view(-1, 1, 1) - key).abs().to(self.dtype)

    def dropout(self, block: Block) -> Tensor | None:
        """0 where a probability is dropped and 1 / (1 − p) elsewhere, (B·G, t·M, s); the same at every call."""
        p = self.settings.dropout_p
        if p == 0:
            return None
        # Odd multipliers spread (seed, t0, s0) over 63 bits, so that neighbouring blocks do not share a stream.
        mixed = self.seed_value + 0x9E3779B97F4A7C15 * (block.t0 + 1) + 0xC2B2AE3D27D4EB4F * (block.s0 + 1)
        generator = torch.Generator(self.device).manual_seed(mixed % _SEED_RANGE)
        shape = self.B * self.G, (block.t1 - block.t0) * self.M, block.s1 - block.s0
        keep = torch.empty(shape, dtype=self.dtype, device=self.device).bernoulli_(1 - p, generator=generator)
        return keep.div_(1 - p)
