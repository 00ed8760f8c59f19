"""The causal depthwise convolution as a sum of W shifted inputs, in traceable torch.

Measured on one core at T = 2048, E = 1536, W = 4, forward and backward: 59 ms against 125 ms for torch's grouped
conv1d at B = 1, 566 against 674 ms at B = 4. The sum needs no transposes, and takes documents as well.

Dimension letters: B batch, T length, E width, W taps, P = W − 1 + T the initial state followed by the inputs.
"""

import torch.nn.functional
from torch import Tensor

from neural_layers.kernels.arguments import accumulation_dtype, document_numbers


def causal_conv1d_torch(
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
    before, length = weight.shape[1] - 1, x.shape[1]
    if initial_state is None:
        x_BPE = torch.nn.functional.pad(x, (0, 0, before, 0))
    else:
        x_BPE = torch.cat([initial_state, x], dim=1)
    document_BP = None if seq_idx is None else _documents(seq_idx, before)

    wide_BPE = x_BPE.to(wide_dtype)
    y_BTE = None if bias is None else bias.to(wide_dtype)
    for w, weight_E in enumerate(weight.to(wide_dtype).unbind(1)):
        shifted_BTE = wide_BPE[:, w : w + length]
        if document_BP is not None and w < before:
            other_BT = document_BP[:, w : w + length] != document_BP[:, before:]
            shifted_BTE = shifted_BTE.masked_fill(other_BT.unsqueeze(-1), 0)
        y_BTE = shifted_BTE * weight_E if y_BTE is None else torch.addcmul(y_BTE, shifted_BTE, weight_E)
    assert y_BTE is not None  # there is at least one tap
    if activation == "silu":
        y_BTE = torch.nn.functional.silu(y_BTE)
    y_BTE = y_BTE.to(x.dtype)
    return (y_BTE, _final_state(x_BPE, document_BP, length)) if return_final_state else y_BTE


def _documents(seq_idx: Tensor, before: int) -> Tensor:
    """The number of each input's document; inputs before the first token belong to its document, number 0."""
    return torch.nn.functional.pad(document_numbers(seq_idx), (before, 0))


def _final_state(x_BPE: Tensor, document_BP: Tensor | None, length: int) -> Tensor:
    """The last W − 1 inputs, zeros for those of another document than the last."""
    state = x_BPE[:, length:]
    if document_BP is None:
        return state.clone()  # a view would keep all the inputs alive
    other = document_BP[:, length:] != document_BP[:, -1:]
    return state.masked_fill(other.unsqueeze(-1), 0)
