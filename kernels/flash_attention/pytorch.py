"""Chunked attention with an online softmax, and its backward by recomputation (FlashAttention-2, arXiv 2307.08691).

No (T, S) tensor is built or saved: the forward pass keeps the output and the log-sum-exp of each row, and the backward
pass computes each block of probabilities again. Blocks that causal or window hide are never visited.

Dimension letters: B batch, T query length, S key length, H query heads, G key/value heads, M = H / G,
K head width, V value width. Rows are as in tiles.py.
"""

import torch
from torch import Tensor

from neural_layers.kernels.flash_attention.blocks import Block
from neural_layers.kernels.flash_attention.tiles import LOG2_E, Settings, Tiles, heads, rows

_INF = float("inf")


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    key_padding_mask: Tensor | None,
    seq_idx: Tensor | None,
    seed: Tensor | None,
    causal: bool,
    window: int | None,
    scale: float,
    softcap: float | None,
    dropout_p: float,
    chunk_size: int | None,
) -> tuple[Tensor, Tensor]:
    """The output (B, T, H, V), and the log-sum-exp of each row (B·G, T·M), +inf for a row without keys."""
    settings = Settings(causal, window, scale, softcap, dropout_p, chunk_size)
    tiles = Tiles(q, k, v, alibi_slopes, key_padding_mask, seq_idx, seed, settings)
    lse = _sink_rows(sinks, tiles)
    out = tiles.q_rows.new_empty(*lse.shape, v.shape[-1])
    # Inside autocast the op would otherwise multiply matrices in half precision, here and in the backward pass.
    with torch.autocast(q.device.type, enabled=False):
        for t0, t1, here in tiles.query_blocks():
            out[:, here], lse[:, here] = _attend(tiles, t0, t1, lse[:, here])
    return heads(out, q, tiles.G), lse


def _attend(tiles: Tiles, t0: int, t1: int, maximum: Tensor) -> tuple[Tensor, Tensor]:
    """Output and log-sum-exp of queries t0…t1; `maximum` starts as the sink, or −inf without one."""
    total = (maximum > -_INF).to(tiles.dtype)
    out = tiles.v_rows.new_zeros(*maximum.shape, tiles.v_rows.shape[-1])
    for block, keys in tiles.key_blocks(t0, t1):
        score = tiles.scores(block).score
        raised = torch.maximum(maximum, score.amax(dim=-1))
        shift = raised.masked_fill(raised == -_INF, 0)  # where no key was seen yet, −inf − (−inf) would be NaN
        weight = tiles.weights(score, shift)
        shrink = torch.exp2(maximum - shift)
        total = total.mul_(shrink).add_(weight.sum(dim=-1))
        dropout = tiles.dropout(block)
        if dropout is not None:
            weight.mul_(dropout)
        out.mul_(shrink.unsqueeze(-1)).baddbmm_(weight, tiles.v_rows[:, keys])
        maximum = raised
    out.div_(total.masked_fill(total == 0, 1).unsqueeze(-1))
    # +inf for a row without keys: exp(score − inf) is then 0 in the backward pass.
    return out, (maximum + total.log2()).masked_fill(total == 0, _INF)


def _sink_rows(sinks: Tensor | None, tiles: Tiles) -> Tensor:
    """The sink of each row, (B·G, T·M); −inf without sinks."""
    shape = tiles.B, tiles.G, tiles.T, tiles.M
    sink_rows: Tensor
    if sinks is None:
        sink_rows = tiles.q_rows.new_full(shape, -_INF)
    else:
        sink_rows = (sinks.to(tiles.dtype) * LOG2_E).view(tiles.G, 1, tiles.M).expand(shape).contiguous()
    return sink_rows.view(tiles.B * tiles.G, tiles.T * tiles.M)


def backward(
    grad: Tensor,
    out: Tensor,
    lse: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    alibi_slopes: Tensor | None,
    sinks: Tensor | None,
    key_padding_mask: Tensor | None,
    seq_idx: Tensor | None,
    seed: Tensor | None,
    causal: bool,
    window: int | None,
    scale: float,
    softcap: float | None,
    dropout_p: float,
    chunk_size: int | None,
    slopes_need_grad: bool,
) -> list[Tensor]:
    """The gradients of q, k, v, of alibi_slopes where asked for, and of sinks where there are any.

    With P the probabilities, D the dropout and δ = Σ_V grad · out:
    dv = (P·D)ᵀ grad;  dscore = P · (D · (grad vᵀ) − δ);  dsink = −Σ exp(sink − lse) · δ;  dslope = −Σ dscore·|distance|
    """
    settings = Settings(causal, window, scale, softcap, dropout_p, chunk_size)
    tiles = Tiles(q, k, v, alibi_slopes, key_padding_mask, seq_idx, seed, settings)
    grad_rows = rows(grad, tiles.G, tiles.dtype)
    delta = (grad_rows * rows(out, tiles.G, tiles.dtype)).sum(dim=-1)
    dq, dk, dv = map(torch.zeros_like, (tiles.q_rows, tiles.k_rows, tiles.v_rows))
    dslopes = tiles.q_rows.new_zeros(tiles.G, tiles.M) if slopes_need_grad else None
    with torch.autocast(q.device.type, enabled=False):
        for t0, t1, here in tiles.query_blocks():
            for block, keys in tiles.key_blocks(t0, t1):
                dscore = _block_backward(tiles, block, grad_rows[:, here], lse[:, here], delta[:, here], dv, dslopes)
                dq[:, here].baddbmm_(dscore, tiles.k_rows[:, keys])
                dk[:, keys].baddbmm_(dscore.mT, tiles.q_rows[:, here])
    grads = [
        heads(dq.mul_(scale), q, tiles.G),
        heads(dk.div_(tiles.q_unit), k, tiles.G),
        heads(dv, v, tiles.G),
    ]
    if alibi_slopes is not None and dslopes is not None:
        grads.append(dslopes.view(tiles.H).to(alibi_slopes.dtype, copy=True))
    if sinks is not None:
        share = torch.exp2(_sink_rows(sinks, tiles) - lse).mul_(delta).view(tiles.B, tiles.G, tiles.T, tiles.M)
        grads.append(-share.sum(dim=(0, 2)).view(tiles.H).to(sinks.dtype))
    return grads


def _block_backward(
    tiles: Tiles, block: Block, grad: Tensor, lse: Tensor, delta: Tensor, dv: Tensor, dslopes: Tensor | None
) -> Tensor:
    """The gradient of the block's uncapped scores; adds to `dv` and `dslopes` in place."""
    keys = slice(block.s0, block.s1)
    scores = tiles.scores(block, for_backward=True)
    probability = tiles.weights(scores.score, lse)
    dprobability = torch.bmm(grad, tiles.v_rows[:, keys].mT)
    dropout = tiles.dropout(block)
    if dropout is None:
        dv[:, keys].baddbmm_(probability.mT, grad)
    else:
        dv[:, keys].baddbmm_((probability * dropout).mT, grad)
        dprobability.mul_(dropout)
    dscore = dprobability.sub_(delta.unsqueeze(-1)).mul_(probability)
    if dslopes is not None:
        dslopes.sub_((tiles.split(dscore, block) * tiles.distance(block)).sum(dim=(0, 2, 4)))
    return dscore if scores.cap_slope is None else dscore.mul_(scores.cap_slope)
