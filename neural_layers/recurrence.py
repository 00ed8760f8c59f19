"""What the mixers with a recurrence share: the causal convolution of their inputs, with masks, documents and caches.

Letters: B batch, T length, S tokens that a mask covers, E channels, W taps of the convolution.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from neural_layers.kernels.causal_conv1d import causal_conv1d


@torch.no_grad()
def reset_step_bias(bias: Tensor) -> None:
    """Such that softplus(bias), the step Δ of a zero input, is log-uniform in [0.001, 0.1]."""
    step = torch.empty_like(bias).uniform_(math.log(1e-3), math.log(1e-1)).exp()
    bias.copy_(step + torch.log(-torch.expm1(-step)))  # the inverse of softplus


class CausalConv1d(nn.Conv1d):
    """The causal depthwise convolution of a mixer, with the parameters of `nn.Conv1d(channels, channels, width,
    groups=channels)`.

    channels: E. width: W. bias: as in `nn.Conv1d`.

    forward(x (B, T, E), *, activation, initial_state, seq_idx) → (B, T, E), as `functional.causal_conv1d`: batch first
    and time second, unlike `nn.Conv1d`. The mixers call the module, so that one in its place (an adapter around it) is
    not passed over.
    """

    def __init__(
        self,
        channels: int,
        width: int,
        bias: bool = True,
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(channels, channels, width, groups=channels, bias=bias, device=device, dtype=dtype)

    def forward(  # type: ignore[override]
        self,
        x: Tensor,
        *,
        activation: str | None = None,
        initial_state: Tensor | None = None,
        seq_idx: Tensor | None = None,
    ) -> Tensor:
        out: Any = causal_conv1d(
            x, self.weight.squeeze(1), self.bias, activation=activation, initial_state=initial_state, seq_idx=seq_idx
        )
        return out


def convolve(
    conv1d: Any,
    inputs_BTE: Tensor,
    cache: Any,
    attention_mask: Tensor | None,
    seq_idx: Tensor | None,
    activation: str | None = "silu",
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """silu of the convolved inputs (or no `activation`), with zeros for padding; the state of the recurrence before
    them, zeroed in rows where they start a new document; and the document of each.

    conv1d is a `CausalConv1d`, or what is called like one and has its `kernel_size`. cache, attention_mask and seq_idx
    are those of the mixer's `forward`; the convolution's state in the cache is
    replaced by that after the inputs.
    """
    kept_BT = _last_columns("attention_mask", attention_mask, inputs_BTE)
    documents_BT = _last_columns("seq_idx", seq_idx, inputs_BTE)
    if kept_BT is not None:
        inputs_BTE = inputs_BTE * kept_BT.bool().unsqueeze(-1)
    conv_state, state = _previous(cache, inputs_BTE, conv1d.kernel_size[0] - 1, seq_idx)
    out_BTE: Tensor = conv1d(inputs_BTE, activation=activation, initial_state=conv_state, seq_idx=documents_BT)
    if kept_BT is not None:  # the convolution's bias has made padding nonzero again
        out_BTE = out_BTE * kept_BT.bool().unsqueeze(-1)
    return out_BTE, state, documents_BT


def _previous(
    cache: Any, inputs_BTE: Tensor, reach: int, seq_idx: Tensor | None
) -> tuple[Tensor | None, Tensor | None]:
    """The convolution's (B, W − 1, E) and the recurrence's (B, …) state before the inputs."""
    if cache is None:
        return None, None
    length = inputs_BTE.shape[1]
    is_filled, state = cache.has_previous_state[0], cache.recurrent_states[0]
    # The old inputs are taken from what comes back, because transformers' layers overwrite theirs in place.
    seen_BES = cache.update_conv_state(inputs_BTE.transpose(1, 2), conv_kernel_size=reach)
    if not is_filled:
        return None, None
    before = seen_BES.shape[-1] - length
    conv_state = seen_BES[..., before - reach : before].transpose(1, 2)
    if seq_idx is not None and length > 0:
        same_BW = _same_document(seq_idx, length, reach)
        conv_state = torch.where(same_BW.unsqueeze(-1)[:, 1:], conv_state, 0)
        state = torch.where(same_BW[:, -1].view(-1, *[1] * (state.ndim - 1)), state, 0)
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
