"""The definition of the causal depthwise convolution: a plain loop over tokens and taps."""

import torch
from torch import Tensor

from neural_layers.kernels.arguments import accumulation_dtype


def causal_conv1d_reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: str | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    seq_idx: Tensor | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """y[t] = Σ_w weight[w]·x[t − (W−1) + w] + bias over the inputs of t's document."""
    wide_dtype = accumulation_dtype(x, weight, bias, initial_state)
    length, width = x.shape[1], weight.shape[1]
    if initial_state is None:
        initial_state = x.new_zeros(x.shape[0], width - 1, x.shape[2])
    inputs = [*initial_state.unbind(1), *x.unbind(1)]  # W − 1 more than tokens
    outputs = []
    for t in range(length):
        y_BE = torch.zeros_like(x[:, t], dtype=wide_dtype)
        for w in range(width):
            seen_BE = inputs[t + w].to(wide_dtype)
            other_B = _other_document(seq_idx, t - (width - 1) + w, t)
            if other_B is not None:
                seen_BE = seen_BE.masked_fill(other_B.unsqueeze(-1), 0)
            y_BE = y_BE + seen_BE * weight[:, w].to(wide_dtype)
        if bias is not None:
            y_BE = y_BE + bias.to(wide_dtype)
        if activation == "silu":
            y_BE = y_BE * torch.sigmoid(y_BE)
        outputs.append(y_BE.to(x.dtype))
    y = torch.stack(outputs, dim=1) if outputs else x.clone()
    return (y, _final_state(initial_state, inputs, length, seq_idx)) if return_final_state else y


def _other_document(seq_idx: Tensor | None, s: int, t: int) -> Tensor | None:
    """The rows (B) in which another document begins after input s and up to token t; s < 0 is the initial state."""
    if seq_idx is None:
        return None
    other_B = torch.zeros_like(seq_idx[:, t], dtype=torch.bool)
    for between in range(max(s, 0) + 1, t + 1):
        other_B = other_B | (seq_idx[:, between] != seq_idx[:, between - 1])
    return other_B


def _final_state(initial_state: Tensor, inputs: list[Tensor], length: int, seq_idx: Tensor | None) -> Tensor:
    """The last W − 1 inputs, zeros for those of another document than the last token's."""
    size = initial_state.shape[1]
    if size == 0 or length == 0:
        return initial_state.clone()
    dtype = torch.promote_types(initial_state.dtype, inputs[-1].dtype)
    kept = []
    for i in range(length, length + size):
        other_B = _other_document(seq_idx, i - size, length - 1)
        kept.append(inputs[i] if other_B is None else inputs[i].masked_fill(other_B.unsqueeze(-1), 0))
    return torch.stack([x_BE.to(dtype) for x_BE in kept], dim=1)
