"""selective_scan and selective_scan_step: values, gradients and the laws of a recurrence."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from neural_layers.kernels.dispatch import BackendError
from neural_layers.kernels.selective_scan import selective_scan
from neural_layers.kernels.selective_scan_step import selective_scan_step
from tests.op_checks import (
    BACKENDS,
    NATIVE,
    Arguments,
    assert_matches_reference,
    non_contiguous,
    relative_error,
    seeded,
)
from tests.tolerances import FORWARD

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
OPTIONAL = ["D", "z", "delta_bias", "initial_state"]
LENGTHS = st.sampled_from([1, 2, 3, 7, 31, 32, 33, 64, 71])
# Numbers that come back, negative ones, and one that no neighbour shares: six documents.
SEQ_IDX = [0, 0, 0, 1, 1, -5, -5, -5, -5, 0, 7, 0, 0, 0, 0]


def make_arguments(shape: tuple[int, int, int, int], seed: int = 0, leave_out: tuple[str, ...] = ()) -> Arguments:
    batch, length, width, states = shape
    normal = seeded(seed)
    arguments = {
        "u": normal(batch, length, width),
        "delta": normal(batch, length, width),
        "A": -normal(width, states).exp(),
        "B": normal(batch, length, states),
        "C": normal(batch, length, states),
        "D": normal(width),
        "z": normal(batch, length, width),
        "delta_bias": normal(width),
        "initial_state": normal(batch, width, states),
    }
    return {name: value for name, value in arguments.items() if name not in leave_out}


def make_seq_idx(batch: int, length: int, seed: int) -> Tensor:
    """Short documents with few numbers, so that numbers come back."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, 2, (batch, (length + 3) // 4), generator=generator).repeat_interleave(4, dim=1)[:, :length]


def part(arguments: Arguments, t0: int, t1: int) -> Arguments:
    """The arguments of tokens t0…t1."""
    timed = ("u", "delta", "B", "C", "z", "seq_idx")
    return {name: value[:, t0:t1] if name in timed else value for name, value in arguments.items()}


def full_scan(**arguments):
    return selective_scan(**arguments, delta_softplus=True, return_final_state=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (3, 33, 5, 4), (0, 3, 2, 2), (2, 70, 3, 16)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_backend_matches_reference_in_value_and_gradient(dtype, shape, contiguous, backend, poisoned_memory) -> None:
    arguments = make_arguments(shape)
    assert_matches_reference(full_scan, arguments, dtype, backend=backend, contiguous=contiguous)
    arguments["seq_idx"] = make_seq_idx(*shape[:2], seed=1)
    assert_matches_reference(full_scan, arguments, dtype, backend=backend, contiguous=contiguous)


@pytest.mark.parametrize("backend", BACKENDS)
@given(
    batch=st.integers(1, 3),
    length=LENGTHS,
    width=st.integers(1, 6),
    states=st.integers(1, 5),
    leave_out=st.sets(st.sampled_from(OPTIONAL)),
    softplus=st.booleans(),
    packed=st.booleans(),
    seed=st.integers(0, 99),
)
def test_backend_matches_reference_with_any_options(
    backend, batch, length, width, states, leave_out, softplus, packed, seed
) -> None:
    arguments = make_arguments((batch, length, width, states), seed, tuple(leave_out))
    if not softplus:
        arguments["delta"] = arguments["delta"].abs()
        arguments |= {"delta_bias": arguments["delta_bias"].abs()} if "delta_bias" in arguments else {}
    if packed:
        arguments["seq_idx"] = make_seq_idx(batch, length, seed).to(torch.int32)
    for final in (False, True):
        call = lambda **kw: selective_scan(**kw, delta_softplus=softplus, return_final_state=final)  # noqa: B023, E731
        assert_matches_reference(call, arguments, torch.float64, backend=backend)


@pytest.mark.parametrize("leave_out", OPTIONAL)
@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_argument_left_out_drops_out_of_the_formula(backend, leave_out) -> None:
    arguments = make_arguments((2, 5, 3, 2))
    if leave_out == "z":
        neutral = torch.full_like(arguments["z"], 1e4)  # silu(10⁴) = 10⁴ exactly
        expected = selective_scan(**{**arguments, "z": neutral}, backend=backend) / 1e4
    else:
        neutral = torch.zeros_like(arguments[leave_out])
        expected = selective_scan(**{**arguments, leave_out: neutral}, backend=backend)
    del arguments[leave_out]
    torch.testing.assert_close(selective_scan(**arguments, backend=backend), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_length_zero_returns_the_initial_state(backend) -> None:
    arguments = make_arguments((2, 0, 3, 4))
    state = arguments["initial_state"].requires_grad_()
    y, final_state = selective_scan(**arguments, return_final_state=True, backend=backend)
    assert y.shape == (2, 0, 3)
    torch.testing.assert_close(final_state, state, rtol=0, atol=0)
    weight = torch.randn_like(final_state)
    torch.testing.assert_close(torch.autograd.grad((final_state * weight).sum(), state)[0], weight)
    del arguments["initial_state"]
    assert selective_scan(**arguments, return_final_state=True, backend=backend)[1].abs().max() == 0


@pytest.mark.parametrize("packed", [False, True])
@given(first=st.integers(0, 40), second=st.integers(0, 40), seed=st.integers(0, 99))
def test_a_split_at_any_token_gives_the_same_values_and_gradients(packed, first, second, seed) -> None:
    arguments = make_arguments((2, 81, 3, 2), seed)
    if packed:
        arguments["seq_idx"] = make_seq_idx(2, 81, seed)
        # The initial state belongs to the document of its first token, so a split must not fall on a border.
        for cut in (first, first + second):
            arguments["seq_idx"][:, cut] = arguments["seq_idx"][:, max(cut - 1, 0)]
    leaves = [value.requires_grad_() for value in arguments.values() if value.is_floating_point()]
    whole_y, whole_state = full_scan(**arguments)

    state, outputs = arguments.pop("initial_state"), []
    for t0, t1 in [(0, first), (first, first + second), (first + second, 81)]:
        y, state = full_scan(**part(arguments, t0, t1), initial_state=state)
        outputs.append(y)
    y = torch.cat(outputs, dim=1)

    torch.testing.assert_close((y, state), (whole_y, whole_state), rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(y), torch.randn_like(state)
    grads = torch.autograd.grad((y, state), leaves, weights)
    torch.testing.assert_close(
        grads, torch.autograd.grad((whole_y, whole_state), leaves, weights), rtol=1e-9, atol=1e-10
    )


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_documents_packed_in_a_row_equal_documents_alone(backend) -> None:
    arguments = make_arguments((1, len(SEQ_IDX), 3, 2))
    seq_idx = torch.tensor([SEQ_IDX])
    packed_y, packed_state = full_scan(**arguments, seq_idx=seq_idx, backend=backend)
    cuts = [0, *(t for t in range(1, len(SEQ_IDX)) if SEQ_IDX[t] != SEQ_IDX[t - 1]), len(SEQ_IDX)]
    assert len(cuts) == 7
    state = arguments.pop("initial_state")
    for t0, t1 in pairwise(cuts):
        y, state = full_scan(**part(arguments, t0, t1), initial_state=state, backend=backend)
        torch.testing.assert_close(packed_y[:, t0:t1], y, rtol=1e-12, atol=1e-12)
        last_state, state = state, None
    torch.testing.assert_close(packed_state, last_state, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@given(length=st.integers(1, 40), leave_out=st.sets(st.sampled_from(OPTIONAL)), seed=st.integers(0, 99))
def test_step_by_step_equals_the_scan(backend, length, leave_out, seed) -> None:
    arguments = make_arguments((2, length, 3, 4), seed, tuple(leave_out))
    expected, expected_state = full_scan(**arguments)
    state = arguments.pop("initial_state", torch.zeros(2, 3, 4, dtype=torch.float64))
    for t in range(length):
        token = {name: value[:, 0] if value.ndim == 3 else value for name, value in part(arguments, t, t + 1).items()}
        before = state.clone()
        y, new_state = selective_scan_step(state, **token, delta_softplus=True, backend=backend)
        torch.testing.assert_close(state, before, rtol=0, atol=0)
        torch.testing.assert_close(y, expected[:, t], rtol=1e-12, atol=1e-12)
        state = new_state
    torch.testing.assert_close(state, expected_state, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("shape", [(3, 5, 4), (2, 300, 16), (1, 1, 1), (0, 3, 2)])
@pytest.mark.parametrize("backend", [NATIVE])
def test_step_in_c_matches_reference(backend, shape, dtype, contiguous, poisoned_memory) -> None:
    batch, width, states = shape
    token = {k: v[:, 0] if v.ndim == 3 else v for k, v in make_arguments((batch, 1, width, states)).items()}
    token = {k: v.to(dtype) for k, v in token.items()} | {"state": seeded(4)(batch, width, states).to(dtype)}
    del token["initial_state"]
    # Without softplus a negative Δ grows without bound.
    token |= {name: token[name].abs() for name in ("delta", "delta_bias")}
    given_token = token if contiguous else {k: non_contiguous(v) for k, v in token.items()}
    exact = {k: v.double() for k, v in token.items()}
    for softplus in (True, False):
        actual = selective_scan_step(**given_token, delta_softplus=softplus, backend=backend)
        expected = selective_scan_step(**exact, delta_softplus=softplus, backend="reference")
        for out, ref in zip(actual, expected, strict=True):
            assert relative_error(out, ref) <= FORWARD[dtype]


@pytest.mark.parametrize("backend", [NATIVE])
def test_step_in_c_refuses_what_needs_a_gradient(backend) -> None:
    token = {k: v[:, 0] if v.ndim == 3 else v for k, v in make_arguments((2, 1, 3, 4)).items()}
    token["state"] = torch.zeros(2, 3, 4).double().requires_grad_()
    del token["initial_state"]
    with pytest.raises(BackendError, match="no gradient"):
        selective_scan_step(**token, backend=backend)


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_step_matches_reference_in_value_and_gradient(dtype, contiguous, poisoned_memory) -> None:
    arguments = make_arguments((3, 1, 5, 4))
    token = {name: value[:, 0] if name in ("u", "delta", "B", "C", "z") else value for name, value in arguments.items()}
    token["state"] = token.pop("initial_state")
    step = lambda **kw: selective_scan_step(**kw, delta_softplus=True)  # noqa: E731
    assert_matches_reference(step, token, dtype, backend="torch", contiguous=contiguous)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_mixed_dtypes_keep_each_gradient_in_its_inputs_dtype(backend) -> None:
    dtypes = {"u": torch.bfloat16, "z": torch.float16, "B": torch.bfloat16, "initial_state": torch.bfloat16}
    arguments = {
        name: value.to(dtypes.get(name, torch.float32)).requires_grad_()
        for name, value in make_arguments((2, 35, 3, 4)).items()
    }
    y, state = full_scan(**arguments, backend=backend)
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    grads = torch.autograd.grad((y, state), list(arguments.values()), (torch.ones_like(y), torch.ones_like(state)))
    assert [grad.dtype for grad in grads] == [value.dtype for value in arguments.values()]
    wide = {name: value.double() for name, value in arguments.items()}
    assert full_scan(**wide, backend=backend)[1].dtype == torch.float64


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_large_steps_forget_the_past_without_nan(backend) -> None:
    arguments = {name: value.float() for name, value in make_arguments((1, 40, 3, 4)).items()}
    arguments["delta"] = torch.full((1, 40, 3), 1e4)
    del arguments["z"], arguments["D"]
    y = selective_scan(**arguments, backend=backend)
    drive = (arguments["B"] * arguments["C"]).sum(-1, keepdim=True)
    expected = (arguments["delta"] + arguments["delta_bias"]) * arguments["u"] * drive
    assert relative_error(y, expected) <= FORWARD[torch.float32]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_nan_and_inf_stay_in_their_channel_and_document(backend, value) -> None:
    arguments = make_arguments((2, 80, 3, 2), leave_out=("z", "D"))
    arguments["u"][0, 35, 1] = value
    seq_idx = torch.zeros(2, 80, dtype=torch.int64)
    seq_idx[0, 70:] = 1
    u = arguments["u"].requires_grad_()
    y, state = full_scan(**arguments, seq_idx=seq_idx, backend=backend)
    assert not y[0, 35:70, 1].isfinite().any()
    clean = torch.ones_like(y, dtype=torch.bool)
    clean[0, 35:70, 1] = False
    assert y[clean].isfinite().all()
    assert state.isfinite().all()
    (grad,) = torch.autograd.grad(y[0, 70:].sum(), u)
    assert grad[0, 70:].isfinite().all()
    assert (grad[:, :70] == 0).all()


def test_scan_and_step_keep_their_precision_under_autocast() -> None:
    arguments = {name: value.float() for name, value in make_arguments((1, 40, 3, 4)).items()}
    token = {name: value[:, 0] if value.ndim == 3 else value for name, value in part(arguments, 0, 1).items()}
    token["state"] = torch.randn(1, 3, 4)
    del token["initial_state"]
    arguments["u"].requires_grad_()
    expected = full_scan(**arguments), torch.autograd.grad(full_scan(**arguments)[0].sum(), arguments["u"])
    expected_step = selective_scan_step(**token)
    with torch.autocast("cpu", torch.bfloat16):
        actual = full_scan(**arguments), torch.autograd.grad(full_scan(**arguments)[0].sum(), arguments["u"])
        torch.testing.assert_close(selective_scan_step(**token), expected_step, rtol=0, atol=0)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("backend", [NATIVE])
@given(
    states=st.sampled_from([1, 2, 8, 9, 16, 17, 32, 64, 256]),
    width=st.sampled_from([1, 15, 16, 63, 64, 65, 130]),
    length=st.sampled_from([1, 31, 33, 70]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 99),
)
def test_scan_in_c_takes_any_number_of_states_and_channels(backend, states, width, length, dtype, seed) -> None:
    arguments = make_arguments((2, length, width, states), seed)
    assert_matches_reference(full_scan, arguments, dtype, backend=backend)


@pytest.mark.parametrize("backend", [NATIVE])
def test_scan_in_c_is_bit_identical_for_any_number_of_threads(backend) -> None:
    arguments = {k: v.float().requires_grad_() for k, v in make_arguments((2, 70, 200, 16)).items()}
    weight, results = torch.randn(2, 70, 200), []
    try:
        for threads in (1, 2, 7):
            torch.set_num_threads(threads)
            y, state = full_scan(**arguments, backend=backend)
            grads = torch.autograd.grad((y * weight).sum() + state.sum(), list(arguments.values()))
            results.append((y, state, *grads))
    finally:
        torch.set_num_threads(1)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("backend", BACKENDS)
def test_decays_of_any_size_match_the_reference(backend) -> None:
    # Δ·A from −10⁵ to 200: decays that vanish, that overflow float32, and everything between.
    arguments = make_arguments((1, 40, 3, 8), leave_out=("z", "delta_bias"))
    arguments["A"] = torch.tensor([-1e4, -200.0, -88.0, -87.0, -1.0, -1e-6, 0.0, 20.0], dtype=torch.float64).repeat(
        3, 1
    )
    arguments["delta"] = torch.linspace(0, 10, 120, dtype=torch.float64).view(1, 40, 3)
    narrow = {name: value.float() for name, value in arguments.items()}
    y, state = selective_scan(**narrow, return_final_state=True, backend=backend)
    expected, expected_state = selective_scan(**narrow, return_final_state=True, backend="reference")
    assert torch.equal(state.isfinite(), expected_state.isfinite())
    assert torch.equal(y.isfinite(), expected.isfinite())
    assert relative_error(y[:, :5], expected[:, :5]) <= FORWARD[torch.float32]
    slow = state[..., :7], expected_state[..., :7]
    assert relative_error(*slow) <= FORWARD[torch.float32]
