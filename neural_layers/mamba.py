"""The Mamba mixer.

Letters: B batch, T length, D width, E inner width, N state size, W convolution width, R rank of Δ, P tokens seen.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from neural_layers.kernels.causal_conv1d import causal_conv1d
from neural_layers.kernels.selective_scan import selective_scan
from neural_layers.kernels.selective_scan_step import selective_scan_step


class Mamba(nn.Module):
    """Selective state space mixer (arXiv 2312.00752), with the parameter names of its reference code.

    u, z = in_proj(x);  u = silu(conv(u));  Δ, B, C = x_proj(u);  y = scan(u, softplus(dt_proj(Δ)), A, B, C) · silu(z)

    dim: D. state_dim: N. conv_width: W. expand: E / D. dt_rank: R, by default D / 16 rounded up.

    forward(x (B, T, D), *, cache, attention_mask, position_ids, seq_idx) → (B, T, D), where with P tokens seen before
      cache:          `LayerCache`, or a linear-attention layer of transformers' cache, which overwrites its state in
                      place and so serves inference alone; None for none
      attention_mask: (B, P + T) or (B, T), true or nonzero for a token that counts. Padding on the left leaves the
                      state at zero; padding on the right changes no output of a real token, but what lies in the cache
                      after it has run on through the padding
      position_ids:   taken and not needed: a recurrence knows its position
      seq_idx:        (B, P + T), the document of each token (a run of equal ids); the state starts anew at a border,
                      also at one between cache and x

    Raises ValueError for shapes that do not fit.
    """

    def __init__(
        self, dim: int, state_dim: int = 16, conv_width: int = 4, expand: int = 2, dt_rank: int | None = None
    ) -> None:
        super().__init__()
        inner = expand * dim
        self.state_dim, self.dt_rank = state_dim, math.ceil(dim / 16) if dt_rank is None else dt_rank
        self.in_proj = nn.Linear(dim, 2 * inner, bias=False)
        self.conv1d = nn.Conv1d(inner, inner, conv_width, groups=inner)
        self.x_proj = nn.Linear(inner, self.dt_rank + 2 * state_dim, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, inner)
        self.A_log = nn.Parameter(torch.empty(inner, state_dim))
        self.D = nn.Parameter(torch.empty(inner))
        self.out_proj = nn.Linear(inner, dim, bias=False)
        self.reset_recurrence()

    @torch.no_grad()
    def reset_recurrence(self) -> None:
        """Initialise what a model's general initialisation must leave alone: A = −(1 … N), D = 1, and Δ's bias such
        that softplus(bias) is log-uniform in [0.001, 0.1]."""
        self.A_log.copy_(torch.arange(1, self.state_dim + 1, dtype=self.A_log.dtype).log().expand_as(self.A_log))
        self.D.fill_(1.0)
        nn.init.uniform_(self.dt_proj.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
        step = torch.empty_like(self.dt_proj.bias).uniform_(math.log(1e-3), math.log(1e-1)).exp()
        self.dt_proj.bias.copy_(step + torch.log(-torch.expm1(-step)))  # the inverse of softplus

    def forward(
        self,
        x: Tensor,
        *,
        cache: Any = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        seq_idx: Tensor | None = None,
    ) -> Tensor:
        kept_BT1 = _last_columns("attention_mask", attention_mask, x)
        documents = _last_columns("seq_idx", seq_idx, x)
        u_BTE, z_BTE = self.in_proj(x).chunk(2, dim=-1)
        if kept_BT1 is not None:
            kept_BT1 = kept_BT1.bool().unsqueeze(-1)
            u_BTE = u_BTE * kept_BT1
        conv_state, state = self._previous(cache, u_BTE, seq_idx)
        weight_EW = self.conv1d.weight.squeeze(1)
        u_BTE = causal_conv1d(
            u_BTE, weight_EW, self.conv1d.bias, activation="silu", initial_state=conv_state, seq_idx=documents
        )
        if kept_BT1 is not None:  # the convolution's bias has made padding nonzero again
            u_BTE = u_BTE * kept_BT1

        dt_BTR, B_BTN, C_BTN = self.x_proj(u_BTE).split([self.dt_rank, self.state_dim, self.state_dim], dim=-1)
        delta_BTE, A_EN = self.dt_proj(dt_BTR), -self.A_log.exp()
        if x.shape[1] == 1 and state is not None:
            inputs = (u_BTE[:, 0], delta_BTE[:, 0], A_EN, B_BTN[:, 0], C_BTN[:, 0])
            y_BE, state = selective_scan_step(state, *inputs, D=self.D, z=z_BTE[:, 0], delta_softplus=True)
            y_BTE = y_BE.unsqueeze(1)
        else:
            y_BTE, state = selective_scan(
                u_BTE,
                delta_BTE,
                A_EN,
                B_BTN,
                C_BTN,
                D=self.D,
                z=z_BTE,
                delta_softplus=True,
                initial_state=state,
                return_final_state=True,
                seq_idx=documents,
            )
        if cache is not None:
            cache.update_recurrent_state(state)
        return self.out_proj(y_BTE)

    def _previous(self, cache: Any, u_BTE: Tensor, seq_idx: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
        """The convolution's (B, W − 1, E) and the recurrence's (B, E, N) state before u, zeroed in rows where u starts
        a new document; the convolution's is replaced in the cache by that after u."""
        if cache is None:
            return None, None
        length, reach = u_BTE.shape[1], self.conv1d.kernel_size[0] - 1
        is_filled, state = cache.has_previous_state[0], cache.recurrent_states[0]
        # The old inputs are taken from what comes back, because transformers' layers overwrite theirs in place.
        inputs_BET = cache.update_conv_state(u_BTE.transpose(1, 2), conv_kernel_size=reach)
        if not is_filled:
            return None, None
        before = inputs_BET.shape[-1] - length
        conv_state = inputs_BET[..., before - reach : before].transpose(1, 2)
        if seq_idx is not None and length > 0:
            same_BW = _same_document(seq_idx, length, reach)
            conv_state = torch.where(same_BW.unsqueeze(-1)[:, 1:], conv_state, 0)
            state = torch.where(same_BW[:, -1].view(-1, 1, 1), state, 0)
        return conv_state, state


def _same_document(seq_idx_BS: Tensor, length: int, reach: int) -> Tensor:
    """Whether each of the reach + 1 tokens before the last `length` is of the first of these's document, (B, W)."""
    before = seq_idx_BS.shape[1] - length
    if before < 1:
        raise ValueError(
            f"seq_idx has shape {tuple(seq_idx_BS.shape)}; with a filled cache it needs a column for each token of the "
            f"cache and of x (T={length}), so that a document's border between them shows"
        )
    near_BS = seq_idx_BS[:, max(before - reach - 1, 0) : before + 1]
    # A document is a run of equal ids: one change in between, and all that lies before is another document's.
    same_BS = (near_BS[:, :-1] == near_BS[:, 1:]).long().flip(1).cumprod(1).flip(1).bool()
    return torch.nn.functional.pad(same_BS, (reach + 1 - same_BS.shape[1], 0), value=False)


def _last_columns(name: str, mask: Tensor | None, x_BTD: Tensor) -> Tensor | None:
    """The columns of `mask` that belong to x; raises ValueError where it does not cover x."""
    if mask is None:
        return None
    if mask.ndim != 2 or mask.shape[0] != x_BTD.shape[0] or mask.shape[1] < x_BTD.shape[1]:
        raise ValueError(
            f"{name} has shape {tuple(mask.shape)}; expected (B, T) = {tuple(x_BTD.shape[:2])}, or one column more for "
            "each token in the cache"
        )
    return mask[:, mask.shape[1] - x_BTD.shape[1] :]
