"""The Mamba-2 mixer.

Letters: B batch, T length, D width, E inner width, H heads, P head width, G groups, N state size, W convolution width,
P tokens seen where a cache is spoken of.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from neural_layers.kernels.rms_norm import rms_norm
from neural_layers.kernels.rotary import apply_rotary
from neural_layers.kernels.ssd_scan import ssd_scan
from neural_layers.linear import Linear
from neural_layers.norm import RMSNorm
from neural_layers.position import RotaryEmbedding
from neural_layers.recurrence import CausalConv1d, convolve, reset_step_bias


class GroupedRMSNorm(nn.Module):
    """RMSNorm of each of G equal parts of the last dimension by itself, times one weight.

    dim: the width E. num_groups: G. forward: (..., E) → (..., E) in the dtype of x.
    """

    def __init__(self, dim: int, num_groups: int = 1, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.num_groups, self.eps = num_groups, eps

    def forward(self, x: Tensor) -> Tensor:
        if self.num_groups == 1:
            return rms_norm(x, self.weight, self.eps)
        parts = x.unflatten(-1, (self.num_groups, -1))
        return rms_norm(parts, parts.new_ones(parts.shape[-1]), self.eps).flatten(-2) * self.weight

    def extra_repr(self) -> str:
        return f"{self.weight.shape[0]}, num_groups={self.num_groups}, eps={self.eps}"


class Mamba2(nn.Module):
    """The mixer of Mamba-2 (arXiv 2405.21060), with the parameters of its reference code, in its layout.

    z, xBC, dt = in_proj(x);  x, B, C = silu(conv(xBC));  y = ssd_scan(x, softplus(dt + dt_bias), A, B, C) · silu(z)
    out_proj(norm(y))

    dim: D. state_dim: N. head_dim: P; E = expand · D is a multiple of it. num_groups: G, the groups of heads that share
    B and C, and of channels that are normalised together. conv_width: W. norm_eps: that of the normalisations.
    inner_dim: E, where it is not expand · D.
    bias: of in_proj; output_bias: of out_proj, where it differs. conv_bias: of the convolution.
    activation: of the convolution, "silu" or None
    norm:       whether y · silu(z) is normalised before out_proj
    bc_norm:    RMSNorm over N of each group of B and C after the convolution (as qk_norm of attention)
    rotary:     a `RotaryEmbedding` of width N, or None: B and C are rotated by their positions, so that C_t · B_s
                depends on t − s as q_t · k_s does in an attention layer with RoPE
    step_limit: the lowest and the highest Δ; larger and smaller ones are clamped

    Linear attention (arXiv 2006.16236) without its denominator is the case of A = 0, Δ = 1, D = 0 and silu(z) = 1
    without convolution, activation and norm: y_t = Σ_s≤t (C_t · B_s) x_s.

    forward(x (B, T, D), *, cache, attention_mask, position_ids, seq_idx) → (B, T, D), where with P tokens seen before
      cache:          `LayerCache`, or a linear-attention layer of transformers' cache, which overwrites its state in
                      place and so serves inference alone; None for none. Its recurrent state is (B, H, P, N)
      attention_mask: (B, P + T) or (B, T), true or nonzero for a token that counts. Padding on the left leaves the
                      state at zero; padding on the right changes no output of a real token, but what lies in the cache
                      after it has run on through the padding
      position_ids:   (T,), (1, T) or (B, T), for `rotary` alone; without, a recurrence knows its position. By default
                      0 … T − 1, and needed where the cache holds tokens
      seq_idx:        (B, P + T), the document of each token (a run of equal ids); the state starts anew at a border,
                      also at one between cache and x

    Raises ValueError for widths, heads and groups that do not divide, and for shapes that do not fit.
    """

    def __init__(
        self,
        dim: int,
        state_dim: int = 128,
        head_dim: int = 64,
        num_groups: int = 1,
        conv_width: int = 4,
        expand: int = 2,
        norm_eps: float = 1e-5,
        *,
        inner_dim: int | None = None,
        bias: bool = False,
        output_bias: bool | None = None,
        conv_bias: bool = True,
        activation: str | None = "silu",
        norm: bool = True,
        bc_norm: bool = False,
        rotary: RotaryEmbedding | None = None,
        step_limit: tuple[float, float] = (0.0, math.inf),
    ) -> None:
        super().__init__()
        inner = expand * dim if inner_dim is None else inner_dim
        name = "expand * dim" if inner_dim is None else "inner_dim"
        if inner % head_dim:
            raise ValueError(f"{name} = {inner} must be a multiple of head_dim={head_dim}")
        heads = inner // head_dim
        if heads % num_groups:
            raise ValueError(f"{name} / head_dim = {heads} heads must be a multiple of num_groups={num_groups}")
        if rotary is not None and rotary.head_dim != state_dim:
            raise ValueError(f"rotary.head_dim={rotary.head_dim} must be state_dim={state_dim}")
        if activation not in (None, "silu"):
            raise ValueError(f"activation={activation!r} must be 'silu' or None")
        if not 0 <= step_limit[0] < step_limit[1]:
            raise ValueError(f"step_limit={step_limit} must be two rising numbers, the first not negative")
        self.head_dim, self.num_groups, self.state_dim = head_dim, num_groups, state_dim
        self.activation, self.rotary, self.step_limit = activation, rotary, tuple(step_limit)
        # The widths of z, x, B, C and dt; the convolution takes the middle three together.
        self.widths = (inner, inner, num_groups * state_dim, num_groups * state_dim, heads)
        convolved = sum(self.widths[1:4])
        self.in_proj = Linear(dim, sum(self.widths), bias=bias)
        self.conv1d = CausalConv1d(convolved, conv_width, bias=conv_bias)
        self.dt_bias = nn.Parameter(torch.empty(heads))
        self.A_log = nn.Parameter(torch.empty(heads))
        self.D = nn.Parameter(torch.empty(heads))
        self.B_norm = RMSNorm(state_dim, norm_eps) if bc_norm else nn.Identity()
        self.C_norm = RMSNorm(state_dim, norm_eps) if bc_norm else nn.Identity()
        self.norm = GroupedRMSNorm(inner, num_groups, norm_eps) if norm else nn.Identity()
        self.out_proj = Linear(inner, dim, bias=bias if output_bias is None else output_bias)
        self.reset_recurrence()

    @torch.no_grad()
    def reset_recurrence(self) -> None:
        """Initialise what a model's general initialisation must leave alone: −A uniform in [1, 16], D = 1, and the bias
        of Δ such that softplus(bias) is log-uniform in [0.001, 0.1]."""
        self.A_log.uniform_(1, 16).log_()
        self.D.fill_(1.0)
        reset_step_bias(self.dt_bias)

    def forward(
        self,
        x: Tensor,
        *,
        cache: Any = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        seq_idx: Tensor | None = None,
    ) -> Tensor:
        z_BTE, inputs_BTE, dt_BTH = self.in_proj(x).split(
            [self.widths[0], sum(self.widths[1:4]), self.widths[4]], dim=-1
        )
        inputs_BTE, state, documents = convolve(
            self.conv1d, inputs_BTE, cache, attention_mask, seq_idx, self.activation
        )
        x_BTE, B_BTE, C_BTE = inputs_BTE.split(self.widths[1:4], dim=-1)
        B_BTGN = self.B_norm(B_BTE.unflatten(-1, (self.num_groups, -1)))
        C_BTGN = self.C_norm(C_BTE.unflatten(-1, (self.num_groups, -1)))
        if self.rotary is not None:
            position_ids = _positions(position_ids, x, state)
            tables = self.rotary(position_ids, torch.promote_types(x.dtype, torch.float32))
            B_BTGN, C_BTGN = apply_rotary(B_BTGN, *tables), apply_rotary(C_BTGN, *tables)
        is_limited = self.step_limit != (0.0, math.inf)
        if is_limited:
            dt_BTH = nn.functional.softplus(dt_BTH + self.dt_bias).clamp(*self.step_limit)
        y_BTHP, state = ssd_scan(
            x_BTE.unflatten(-1, (-1, self.head_dim)),
            dt_BTH,
            -self.A_log.exp(),
            B_BTGN,
            C_BTGN,
            D=self.D,
            z=z_BTE.unflatten(-1, (-1, self.head_dim)),
            dt_bias=None if is_limited else self.dt_bias,
            dt_softplus=not is_limited,
            initial_state=state,
            return_final_state=True,
            seq_idx=documents,
        )
        if cache is not None:
            cache.update_recurrent_state(state)
        return self.out_proj(self.norm(y_BTHP.flatten(2)))


def _positions(position_ids: Tensor | None, x_BTD: Tensor, state: Tensor | None) -> Tensor:
    """The positions (T,) or (B, T) of x; raises ValueError where only the caller can know them."""
    if position_ids is None:
        if state is not None:
            raise ValueError("position_ids are needed with rotary and a filled cache: a recurrence does not count")
        return torch.arange(x_BTD.shape[1], device=x_BTD.device)
    return position_ids[0] if position_ids.ndim == 2 and position_ids.shape[0] == 1 else position_ids
