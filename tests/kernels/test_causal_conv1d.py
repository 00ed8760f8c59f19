"""causal_conv1d: values and gradients against its reference and torch's conv1d, documents, and states."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from neural_layers.kernels.causal_conv1d import causal_conv1d
from tests.op_checks import Arguments, assert_matches_reference, seeded

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
BACKENDS = ["torch", "reference"]
# Documents of 3, 1, 2, 1 and 5 tokens; the last number came before.
SEQ_IDX = [4, 4, 4, -1, 0, 0, 9, 4, 4, 4, 4, 4]
CUTS = [0, 3, 4, 6, 7, 12]


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
def test_torch_backend_matches_reference_in_value_and_gradient(dtype, shape, contiguous, poisoned_memory) -> None:
    arguments = make_arguments(*shape)
    assert_matches_reference(silu_conv, arguments, dtype, backend="torch", contiguous=contiguous)
    arguments["seq_idx"] = make_seq_idx(*shape[:2], seed=1)
    assert_matches_reference(silu_conv, arguments, dtype, backend="torch", contiguous=contiguous)


@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 20),
    width=st.integers(1, 4),
    taps=st.integers(1, 5),
    leave_out=st.sets(st.sampled_from(["bias", "initial_state"])),
    activation=st.sampled_from([None, "silu"]),
    packed=st.booleans(),
    seed=st.integers(0, 99),
)
def test_torch_backend_matches_reference_with_any_options(
    batch, length, width, taps, leave_out, activation, packed, seed
) -> None:
    arguments = {k: v for k, v in make_arguments(batch, length, width, taps, seed).items() if k not in leave_out}
    if packed:
        arguments["seq_idx"] = make_seq_idx(batch, length, seed)
    call = lambda **kw: causal_conv1d(**kw, activation=activation, return_final_state=True)  # noqa: E731
    assert_matches_reference(call, arguments, torch.float64, backend="torch")
    y, _ = call(**arguments)
    torch.testing.assert_close(causal_conv1d(**arguments, activation=activation), y, rtol=0, atol=0)


@pytest.mark.parametrize("taps", [1, 2, 4])
@pytest.mark.parametrize("backend", BACKENDS)
def test_convolution_equals_that_of_torch(backend, taps) -> None:
    arguments = make_arguments(2, 9, 3, taps)
    before = torch.cat([arguments["initial_state"], arguments["x"]], dim=1)
    weight = arguments["weight"].unsqueeze(1)
    expected = torch.nn.functional.conv1d(before.mT, weight, arguments["bias"], groups=3).mT
    torch.testing.assert_close(causal_conv1d(**arguments, backend=backend), expected, rtol=1e-12, atol=1e-12)
    silu = torch.nn.functional.silu(expected)
    y, state = silu_conv(**arguments, backend=backend)
    torch.testing.assert_close((y, state), (silu, before[:, 9:]), rtol=1e-12, atol=1e-12)
    del arguments["initial_state"]
    padded = torch.nn.functional.pad(arguments["x"], (0, 0, taps - 1, 0))
    expected = torch.nn.functional.conv1d(padded.mT, weight, arguments["bias"], groups=3).mT
    torch.testing.assert_close(causal_conv1d(**arguments, backend=backend), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
@given(cut=st.integers(0, 12), seed=st.integers(0, 99))
def test_a_split_at_any_token_gives_the_same_values_and_gradients(backend, packed, cut, seed) -> None:
    arguments = make_arguments(2, 12, 3, 4, seed)
    state = arguments.pop("initial_state").requires_grad_()
    x = arguments.pop("x").requires_grad_()
    seq_idx = make_seq_idx(2, 12, seed) if packed else None
    if seq_idx is not None and 0 < cut < 12:
        seq_idx[:, cut] = seq_idx[:, cut - 1]  # the state belongs to the document of the first token that follows it

    def run(t0, t1, state):
        documents = None if seq_idx is None else seq_idx[:, t0:t1]
        return silu_conv(x=x[:, t0:t1], **arguments, initial_state=state, seq_idx=documents, backend=backend)

    whole = run(0, 12, state)
    first, middle = run(0, cut, state)
    second, last = run(cut, 12, middle)
    parts = torch.cat([first, second], dim=1), last
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-12)
    weights = torch.randn_like(whole[0]), torch.randn_like(whole[1])
    grads = [torch.autograd.grad(outputs, (x, state), weights) for outputs in (parts, whole)]
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_documents_packed_in_a_row_equal_documents_alone(backend) -> None:
    arguments = make_arguments(1, 12, 3, 4)
    packed_y, packed_state = silu_conv(**arguments, seq_idx=torch.tensor([SEQ_IDX]), backend=backend)
    x, state = arguments.pop("x"), arguments.pop("initial_state")
    for t0, t1 in pairwise(CUTS):
        y, last_state = silu_conv(x=x[:, t0:t1], **arguments, initial_state=state, backend=backend)
        torch.testing.assert_close(packed_y[:, t0:t1], y, rtol=1e-12, atol=1e-12)
        state = None
    torch.testing.assert_close(packed_state, last_state, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("length", [4, 5, 6])
def test_final_state_holds_no_input_of_another_document(backend, length) -> None:
    arguments = make_arguments(1, length, 2, 4)
    arguments["x"] += 10  # no zeros of its own
    _, state = silu_conv(**arguments, seq_idx=torch.tensor([SEQ_IDX[:length]]), backend=backend)
    kept = {4: 1, 5: 1, 6: 2}[length]
    assert (state[:, : 3 - kept] == 0).all()
    torch.testing.assert_close(state[:, 3 - kept :], arguments["x"][:, length - kept :], rtol=0, atol=0)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("packed", [False, True])
def test_length_zero_returns_the_initial_state(backend, packed) -> None:
    arguments = make_arguments(2, 0, 3, 4)
    seq_idx = torch.zeros(2, 0, dtype=torch.int64) if packed else None
    y, state = silu_conv(**arguments, seq_idx=seq_idx, backend=backend)
    assert y.shape == (2, 0, 3)
    torch.testing.assert_close(state, arguments.pop("initial_state"), rtol=0, atol=0)
    assert (silu_conv(**arguments, seq_idx=seq_idx, backend=backend)[1] == torch.zeros(2, 3, 3)).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_stays_in_its_channel_document_and_reach(backend) -> None:
    arguments = make_arguments(1, 12, 3, 4)
    arguments["x"][0, 1, 0] = arguments["x"][0, 8, 1] = float("nan")
    y, state = silu_conv(**arguments, seq_idx=torch.tensor([SEQ_IDX]), backend=backend)
    expected = torch.zeros(1, 12, 3, dtype=torch.bool)
    expected[0, 1:3, 0] = expected[0, 8:12, 1] = True
    assert torch.equal(y.isnan(), expected)
    assert state.isfinite().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_final_state_takes_the_wider_dtype_of_input_and_state(backend) -> None:
    arguments = {name: value.bfloat16() for name, value in make_arguments(1, 5, 3, 4).items()}
    y, state = silu_conv(**arguments, backend=backend)
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.bfloat16)
    arguments["initial_state"] = arguments["initial_state"].float()
    y, state = silu_conv(**arguments, backend=backend)
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("seq_idx", [None, torch.tensor([[0, 0, 1, 0, 0], [5, 5, 5, 5, 5]])])
@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_match_finite_differences(backend, seq_idx) -> None:
    arguments = {name: value.requires_grad_() for name, value in make_arguments(2, 5, 2, 3).items()}

    def call(*values):
        return silu_conv(**dict(zip(arguments, values, strict=True)), seq_idx=seq_idx, backend=backend)

    assert torch.autograd.gradcheck(call, tuple(arguments.values()))
    assert torch.autograd.gradgradcheck(call, tuple(arguments.values()))


@pytest.mark.parametrize("dynamic", [False, True])
def test_convolution_is_traced_without_graph_break(dynamic) -> None:
    compiled = torch.compile(lambda kw: silu_conv(**kw), fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for length in (6, 11):
        arguments = make_arguments(2, length, 3, 4)
        x = arguments["x"].requires_grad_()
        arguments["seq_idx"] = make_seq_idx(2, length, seed=3)
        actual, expected = compiled(arguments), silu_conv(**arguments)
        torch.testing.assert_close(actual, expected)
        grads = [torch.autograd.grad(y.sum() + state.sum(), x)[0] for y, state in (actual, expected)]
        torch.testing.assert_close(*grads)


def test_final_state_does_not_keep_the_inputs_alive() -> None:
    _, state = silu_conv(**make_arguments(1, 500, 3, 4))
    assert state.untyped_storage().nbytes() == 3 * 3 * 8


def test_convolution_keeps_its_precision_under_autocast() -> None:
    arguments = {name: value.float() for name, value in make_arguments(2, 9, 3, 4).items()}
    expected = silu_conv(**arguments)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(silu_conv(**arguments), expected, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"x": torch.ones(2, 3)}, ValueError, r"x has shape \(2, 3\); expected \(B, T, E\)"),
        ({"weight": torch.ones(4, 4)}, ValueError, r"weight has shape \(4, 4\); .*E=3"),
        ({"weight": torch.ones(3, 0)}, ValueError, "W=0 must be at least 1"),
        ({"bias": torch.ones(4)}, ValueError, r"bias has shape \(4,\); .*E=3"),
        ({"initial_state": torch.ones(2, 4, 3)}, ValueError, r"initial_state has shape \(2, 4, 3\).*\(2, 3, 3\)"),
        ({"activation": "gelu"}, ValueError, "activation='gelu' must be None or 'silu'"),
        ({"seq_idx": torch.zeros(2, 4, dtype=torch.int32)}, ValueError, r"seq_idx has shape \(2, 4\).*\(2, 5\)"),
        ({"seq_idx": torch.zeros(2, 5)}, TypeError, "seq_idx has dtype torch.float32"),
        ({"weight": torch.ones(3, 4, dtype=torch.int32)}, TypeError, "weight has dtype torch.int32"),
        ({"bias": torch.ones(3, device="meta")}, ValueError, "different devices: .*bias on meta"),
    ],
)
def test_bad_arguments_are_named(changes, error, message) -> None:
    with pytest.raises(error, match=message):
        causal_conv1d(**make_arguments(2, 5, 3, 4) | changes)
