"""The Mamba mixer.

Letters: B batch, T length, D width, E inner width, N state size, W convolution width, R rank of Δ, P tokens seen.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from neural_layers.kernels.selective_scan import selective_scan
from neural_layers.kernels.selective_scan_step import selective_scan_step
from neural_layers.linear import Linear
from neural_layers.recurrence import CausalConv1d, convolve, reset_step_bias


class Mamba(nn.Module):
    """Selective state space mixer (arXiv 2312.00752), with the parameter names of its reference code.

    u, z = in_proj(x);  u = silu(conv(u));  Δ, B, C = x_proj(u);  y = scan(u, softplus(dt_proj(Δ)), A, B, C) · silu(z)

    dim: D. state_dim: N. conv_width: W. expand: E / D. dt_rank: R, by default D / 16 rounded up.
    inner_dim: E, where it is not expand · D.
    bias: of in_proj and out_proj. conv_bias: of the convolution.

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
        self,
        dim: int,
        state_dim: int = 16,
        conv_width: int = 4,
        expand: int = 2,
        dt_rank: int | None = None,
        *,
        inner_dim: int | None = None,
        bias: bool = False,
        conv_bias: bool = True,
    ) -> None:
        super().__init__()
        inner = expand * dim if inner_dim is None else inner_dim
        self.state_dim, self.dt_rank = state_dim, math.ceil(dim / 16) if dt_rank is None else dt_rank
        self.in_proj = Linear(dim, 2 * inner, bias=bias)
        self.conv1d = CausalConv1d(inner, conv_width, bias=conv_bias)
        self.x_proj = Linear(inner, self.dt_rank + 2 * state_dim, bias=False)
        self.dt_proj = Linear(self.dt_rank, inner)
        self.A_log = nn.Parameter(torch.empty(inner, state_dim))
        self.D = nn.Parameter(torch.empty(inner))
        self.out_proj = Linear(inner, dim, bias=bias)
        self.reset_recurrence()

    @torch.no_grad()
    def reset_recurrence(self) -> None:
        """Initialise what a model's general initialisation must leave alone: A = −(1 … N), D = 1, and Δ's bias such
        that softplus(bias) is log-uniform in [0.001, 0.1]."""
        self.A_log.copy_(torch.arange(1, self.state_dim + 1, dtype=self.A_log.dtype).log().expand_as(self.A_log))
        self.D.fill_(1.0)
        nn.init.uniform_(self.dt_proj.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
        reset_step_bias(self.dt_proj.bias)

    def forward(
        self,
        x: Tensor,
        *,
        cache: Any = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        seq_idx: Tensor | None = None,
    ) -> Tensor:
        u_BTE, z_BTE = self.in_proj(x).chunk(2, dim=-1)
        u_BTE, state, documents = convolve(self.conv1d, u_BTE, cache, attention_mask, seq_idx)
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
