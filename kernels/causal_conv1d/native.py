"""The causal depthwise convolution in C (backend `native`): conv.h, native.c, native_backward.c."""

from struct import Struct

import torch
from torch import Tensor

from neural_layers.kernels.c_library import code, plain, record_function

# The struct Conv of conv.h.
_pack = Struct("13P17qP").pack
# The struct Step of native.c.
_pack_step = Struct("6P4q").pack
# Rows of (B·T, E) to a task. The gradients of weight and bias are sums of as many parts as there are tasks.
_LEAST_ROWS, _MOST_TASKS = 64, 64


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    activation: str | None,
    return_final_state: bool,
) -> tuple[Tensor, Tensor | None]:
    """y (B, T, E) and, where it is wanted, the final state (B, W − 1, E)."""
    final = None
    if return_final_state:
        batch, _, width = x.shape
        final_dtype = x.dtype if initial_state is None else torch.promote_types(x.dtype, initial_state.dtype)
        final = torch.empty((batch, weight.shape[1] - 1, width), dtype=final_dtype)
    y = torch.empty_like(x) if x.is_contiguous() else x.new_empty(x.shape)
    _run(
        "causal_conv1d_forward", activation, x, weight, bias, initial_state, None, None, seq_idx, y, final, *[None] * 4
    )
    return y, final


def backward(
    grad_y: Tensor,
    grad_final_state: Tensor | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    seq_idx: Tensor | None,
    activation: str | None,
) -> list[Tensor]:
    """The gradients of x and weight, and of bias and initial_state where given."""
    inputs = x, weight, bias, initial_state
    grads = [None if tensor is None else tensor.new_empty(tensor.shape) for tensor in inputs]
    if initial_state is not None and x.shape[1] == 0:  # there are no rows that the kernel would go through
        assert grads[3] is not None
        grads[3].zero_() if grad_final_state is None else grads[3].copy_(grad_final_state)
    if grad_final_state is not None:
        grad_final_state = grad_final_state.contiguous()
    tensors = bias, initial_state, grad_y.contiguous(), grad_final_state, seq_idx, None, None, *grads
    _run("causal_conv1d_backward", activation, x, weight, *tensors)
    return [grad for grad in grads if grad is not None]


def _run(
    name: str,
    activation: str | None,
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial: Tensor | None,
    grad_y: Tensor | None,
    grad_final: Tensor | None,
    seq_idx: Tensor | None,
    y: Tensor | None,
    final: Tensor | None,
    *grads: Tensor | None,
) -> None:
    """Call the function of the C library; what it cannot read where it is, is copied."""
    arithmetic = torch.float32
    for tensor in (x, weight, bias, initial):
        if tensor is not None and tensor.dtype == torch.float64:
            arithmetic = torch.float64
    x = x if x.stride(2) == 1 else x.contiguous()
    weight, bias = weight.contiguous(), bias if bias is None else bias.contiguous()
    seq_idx = seq_idx if seq_idx is None else seq_idx.to(torch.int64).contiguous()
    (batch, length, width), taps = x.shape, weight.shape[1]
    tensors = (x, weight, bias, initial, grad_y, grad_final, seq_idx, y, final, *grads)
    record_function(name, arithmetic)(
        _pack(
            *[0 if tensor is None else tensor.data_ptr() for tensor in tensors],
            *(batch, length, width, taps, max(_LEAST_ROWS, -(-batch * length // _MOST_TASKS))),
            *(activation == "silu", torch.get_num_threads(), *x.stride()[:2]),
            *((0, 0, 0) if initial is None else initial.stride()),
            *(code(x, arithmetic), code(weight, arithmetic), code(bias, arithmetic), code(initial, arithmetic)),
            code(final if grad_final is None else grad_final, arithmetic),
            0,
        )
    )


def step(
    x: Tensor, weight: Tensor, bias: Tensor | None, activation: str | None, state: Tensor
) -> tuple[Tensor, Tensor] | None:
    """y and the final state for a single token in the plain case, or None where the case is another.

    Plain are contiguous tensors of one dtype, float32 or float64, that fit and that nothing watches. What is asked here
    stands for all the checks of the op, which cost more than the step itself.
    """
    if not plain(x, weight, bias, state) or activation not in (None, "silu") or state.dim() != 3:
        return None
    (batch, before, width), dtype = state.shape, x.dtype
    if x.shape != (batch, 1, width) or weight.shape != (width, before + 1):
        return None
    if weight.dtype != dtype or state.dtype != dtype or (dtype != torch.float32 and dtype != torch.float64):
        return None
    if bias is not None and (bias.shape != (width,) or bias.dtype != dtype):
        return None
    y, final = torch.empty_like(x), torch.empty_like(state)
    addresses = x.data_ptr(), weight.data_ptr(), 0 if bias is None else bias.data_ptr(), state.data_ptr()
    sizes = batch, width, before + 1, activation == "silu"
    record_function("causal_conv1d_step", dtype)(_pack_step(*addresses, y.data_ptr(), final.data_ptr(), *sizes))
    return y, final
