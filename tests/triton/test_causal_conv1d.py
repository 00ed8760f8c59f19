"""causal_conv1d on the backend `triton`: values, gradients, states and documents against the reference."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from neural_layers.kernels.causal_conv1d import causal_conv1d
from neural_layers.kernels.dispatch import BackendError
from tests.op_checks import Arguments, assert_matches_reference, seeded
from tests.triton.checks import on

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# Documents of 3, 1, 2, 1 and 5 tokens; the last number came before.
SEQ_IDX = [4, 4, 4, -1, 0, 0, 9, 4, 4, 4, 4, 4]


def make_arguments(batch: int, length: int, width: int, taps: int, seed: int = 0) -> Arguments:
    normal = seeded(seed)
    return {
        "x": normal(batch, length, width),
        "weight": normal(width, taps),
        "bias": normal(width),
        "initial_state": normal(batch, taps - 1, width),
    }


def make_seq_idx(batch: int, length: int, seed: int) -> Tensor:
    """Short documents with few numbers, so that numbers come back."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, 2, (batch, (length + 1) // 2), generator=generator).repeat_interleave(2, dim=1)[:, :length]


def silu_conv(**arguments):
    return causal_conv1d(**arguments, activation="silu", return_final_state=True)


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 9, 5, 4), (0, 3, 2, 4), (3, 2, 4, 5)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_match_the_reference_in_value_and_gradient(device, dtype, shape, contiguous, poisoned_memory) -> None:
    arguments = make_arguments(*shape)
    arguments["seq_idx"] = make_seq_idx(*shape[:2], seed=1)
    assert_matches_reference(on(device, silu_conv), arguments, dtype, backend="triton", contiguous=contiguous)


@given(
    batch=st.integers(1, 2),
    length=st.integers(1, 20),
    width=st.integers(1, 5),
    taps=st.integers(1, 8),
    leave_out=st.sets(st.sampled_from(["bias", "initial_state"])),
    activation=st.sampled_from([None, "silu"]),
    packed=st.booleans(),
    return_final_state=st.booleans(),
    seed=st.integers(0, 99),
)
def test_kernels_match_the_reference_with_any_options(
    device, batch, length, width, taps, leave_out, activation, packed, return_final_state, seed
) -> None:
    arguments = {k: v for k, v in make_arguments(batch, length, width, taps, seed).items() if k not in leave_out}
    if packed:
        arguments["seq_idx"] = make_seq_idx(batch, length, seed)

    wants_state = return_final_state or taps == 1  # else nothing would depend on a state without entries

    def call(**kwargs):
        return causal_conv1d(**kwargs, activation=activation, return_final_state=wants_state)

    assert_matches_reference(on(device, call), arguments, torch.float64, backend="triton")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("length", [33, 48])
def test_stretches_of_a_long_sequence_join(device, length, packed) -> None:
    """Several tiles forward and several stretches backward, the last one whole or not."""
    arguments = make_arguments(1, length, 3, 4)
    if packed:
        arguments["seq_idx"] = make_seq_idx(1, length, seed=2)
    assert_matches_reference(on(device, silu_conv), arguments, torch.float32, backend="triton")


def test_more_channels_than_a_block(device) -> None:
    arguments = make_arguments(1, 3, 300, 3)
    arguments["seq_idx"] = torch.tensor([[1, 1, 0]], dtype=torch.int32)
    assert_matches_reference(on(device, silu_conv), arguments, torch.float32, backend="triton")


def test_dtypes_may_differ_among_the_arguments(device) -> None:
    arguments = {k: v.to(device) for k, v in make_arguments(2, 5, 3, 4).items()}
    arguments["x"], arguments["weight"] = arguments["x"].bfloat16(), arguments["weight"].float()
    arguments["bias"], arguments["initial_state"] = arguments["bias"].half(), arguments["initial_state"].float()
    arguments = {k: v.requires_grad_() for k, v in arguments.items()}
    outputs = [silu_conv(**arguments, backend=backend) for backend in ("triton", "reference")]
    assert [(y.dtype, state.dtype) for y, state in outputs] == [(torch.bfloat16, torch.float32)] * 2
    torch.testing.assert_close(*outputs, rtol=8e-3, atol=8e-3)
    grads = [torch.autograd.grad(y.sum() + state.sum(), list(arguments.values())) for y, state in outputs]
    assert [grad.dtype for grad in grads[0]] == [value.dtype for value in arguments.values()]
    torch.testing.assert_close(*grads, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("packed", [False, True])
def test_length_zero_returns_the_initial_state_and_its_gradient(device, packed) -> None:
    arguments = {k: v.to(device).requires_grad_() for k, v in make_arguments(2, 0, 3, 4).items()}
    seq_idx = torch.zeros(2, 0, dtype=torch.int64, device=device) if packed else None
    y, state = silu_conv(**arguments, seq_idx=seq_idx, backend="triton")
    assert y.shape == (2, 0, 3)
    torch.testing.assert_close(state, arguments["initial_state"], rtol=0, atol=0)
    weights = torch.randn_like(state)
    grads = torch.autograd.grad(state, list(arguments.values()), weights)
    torch.testing.assert_close(grads[3], weights, rtol=0, atol=0)
    assert all((grad == 0).all() for grad in grads[:3])
    del arguments["initial_state"]
    assert (silu_conv(**arguments, seq_idx=seq_idx, backend="triton")[1] == 0).all()


def test_nan_stays_in_its_channel_document_and_reach(device) -> None:
    arguments = make_arguments(1, 12, 3, 4)
    del arguments["initial_state"]
    arguments["x"][0, 1, 0] = arguments["x"][0, 8, 1] = float("nan")
    arguments = {k: v.to(device).requires_grad_() for k, v in arguments.items()}
    seq_idx = torch.tensor([SEQ_IDX], device=device)
    outputs = [causal_conv1d(**arguments, seq_idx=seq_idx, backend=b) for b in ("triton", "reference")]
    torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-12, equal_nan=True)
    grads = [torch.autograd.grad(y.sum(), list(arguments.values())) for y in outputs]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("activation", [None, "silu"])
def test_nan_in_the_last_input_reaches_what_it_reaches_in_the_reference(device, activation) -> None:
    arguments = make_arguments(1, 6, 2, 4)
    del arguments["initial_state"]
    arguments["x"][0, 5, 0] = float("nan")
    arguments = {k: v.to(device).requires_grad_() for k, v in arguments.items()}
    outputs = [causal_conv1d(**arguments, activation=activation, backend=b) for b in ("triton", "torch")]
    grads = [torch.autograd.grad(y.sum(), list(arguments.values())) for y in outputs]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12, equal_nan=True)


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
def test_a_last_input_that_would_overflow_at_a_later_token_reaches_no_gradient(device) -> None:
    """The backward walks on past the end, where this input meets taps that no token gives it."""
    x, weight = torch.zeros(1, 6, 2, device=device), torch.tensor([[10.0, 10.0, 10.0, 1e-38]] * 2, device=device)
    x[0, 5] = 3e38
    arguments = {"x": x.requires_grad_(), "weight": weight.requires_grad_()}
    outputs = [causal_conv1d(**arguments, activation="silu", backend=b) for b in ("triton", "reference")]
    grads = [torch.autograd.grad(y.sum(), x)[0] for y in outputs]
    assert grads[1].isfinite().all()
    torch.testing.assert_close(*grads, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("packed", [False, True])
def test_gradients_match_finite_differences(device, packed) -> None:
    arguments = {k: v.to(device).requires_grad_() for k, v in make_arguments(2, 5, 2, 3).items()}
    seq_idx = torch.tensor([[0, 0, 1, 0, 0], [5, 5, 5, 5, 5]], device=device) if packed else None

    def call(*values):
        return silu_conv(**dict(zip(arguments, values, strict=True)), seq_idx=seq_idx, backend="triton")

    assert torch.autograd.gradcheck(call, tuple(arguments.values()), fast_mode=True)


def test_kernels_give_the_same_bits_again(device) -> None:
    arguments = {k: v.float().to(device).requires_grad_() for k, v in make_arguments(2, 40, 3, 4).items()}
    outputs = [silu_conv(**arguments, backend="triton") for _ in range(2)]
    grads = [torch.autograd.grad(y.sum() + state.sum(), list(arguments.values())) for y, state in outputs]
    assert all(map(torch.equal, *outputs))
    assert all(map(torch.equal, *grads))


def test_op_passes_the_checks_of_torch_and_is_traced(device) -> None:
    arguments = {k: v.to(device).requires_grad_() for k, v in make_arguments(2, 6, 3, 4).items()}
    seq_idx = make_seq_idx(2, 6, seed=3).to(device)
    custom = torch.ops.neural_layers.causal_conv1d.default
    for final in (False, True):
        torch.library.opcheck(custom, (*arguments.values(), seq_idx, "silu", final, "triton"))
    compiled = torch.compile(lambda kw: silu_conv(**kw, backend="triton"), fullgraph=True, backend="aot_eager")
    arguments["seq_idx"] = seq_idx
    actual, expected = compiled(arguments), silu_conv(**arguments, backend="triton")
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    grads = [torch.autograd.grad(y.sum() + state.sum(), arguments["x"])[0] for y, state in (actual, expected)]
    torch.testing.assert_close(*grads, rtol=0, atol=0)


def test_more_taps_than_registers_hold_are_refused_in_words(device) -> None:
    arguments = {k: v.to(device) for k, v in make_arguments(1, 2, 2, 9).items()}
    with pytest.raises(BackendError, match="more than 8 taps, and the kernels keep each in registers"):
        causal_conv1d(**arguments, backend="triton")


def test_a_gradient_of_the_gradient_is_refused_in_words(device) -> None:
    arguments = {k: v.to(device).requires_grad_() for k, v in make_arguments(1, 2, 2, 2).items()}
    y = causal_conv1d(**arguments, backend="triton")
    grad = torch.autograd.grad(y.sum(), arguments["weight"], create_graph=True)[0]
    with pytest.raises(NotImplementedError, match="causal_conv1d has no gradient of the gradient"):
        grad.sum().backward()
