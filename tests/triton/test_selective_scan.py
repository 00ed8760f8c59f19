"""selective_scan and selective_scan_step on the backend `triton`: values, gradients, states, documents, segments.

The interpreter takes some milliseconds for each token of a program, so chunks are made shorter than on a GPU.
"""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from neural_layers.kernels.dispatch import BackendError
from neural_layers.kernels.selective_scan import fused, selective_scan
from neural_layers.kernels.selective_scan_step import selective_scan_step
from tests.kernels.test_selective_scan import DTYPES, OPTIONAL, full_scan, make_arguments, make_seq_idx
from tests.op_checks import assert_matches_reference, non_contiguous, relative_error, seeded
from tests.tolerances import FORWARD
from tests.triton.checks import on


@pytest.fixture
def short_chunks(device, monkeypatch) -> None:
    """Chunks of 8 tokens, of which one makes a segment."""
    from neural_layers.kernels.selective_scan import triton_forward

    monkeypatch.setattr(triton_forward, "CHUNK", 8)
    monkeypatch.setattr(triton_forward, "LEAST_CHUNKS", 1)
    short = fused.IMPLEMENTATIONS["triton"]._replace(chunk=8)
    monkeypatch.setitem(fused.IMPLEMENTATIONS, "triton", short)


def test_the_op_knows_how_often_the_kernels_keep_a_state(device) -> None:
    from neural_layers.kernels.selective_scan import triton_forward

    assert fused.IMPLEMENTATIONS["triton"].chunk == triton_forward.CHUNK
    # Segments are walked in whole groups of tokens.
    assert triton_forward.CHUNK % triton_forward.TOGETHER == 0


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1), (2, 19, 5, 4), (0, 3, 2, 2), (1, 9, 3, 17)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_match_the_reference_in_value_and_gradient(
    device, short_chunks, dtype, shape, contiguous, poisoned_memory
) -> None:
    arguments = make_arguments(shape)
    if contiguous:
        arguments["seq_idx"] = make_seq_idx(*shape[:2], seed=1)
    assert_matches_reference(on(device, full_scan), arguments, dtype, backend="triton", contiguous=contiguous)


@settings(max_examples=8, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    batch=st.just(1) | st.integers(1, 2),
    length=st.sampled_from([1, 3, 8, 13, 17]),
    width=st.integers(1, 5),
    states=st.integers(1, 5),
    leave_out=st.sets(st.sampled_from(OPTIONAL)),
    softplus=st.booleans(),
    packed=st.booleans(),
    final=st.booleans(),
    seed=st.integers(0, 99),
)
def test_kernels_match_the_reference_with_any_options(
    device, short_chunks, batch, length, width, states, leave_out, softplus, packed, final, seed
) -> None:
    arguments = make_arguments((batch, length, width, states), seed, tuple(leave_out))
    if not softplus:
        arguments["delta"] = arguments["delta"].abs()
        arguments |= {"delta_bias": arguments["delta_bias"].abs()} if "delta_bias" in arguments else {}
    if packed:
        arguments["seq_idx"] = make_seq_idx(batch, length, seed).to(torch.int32)
    call = lambda **kw: selective_scan(**kw, delta_softplus=softplus, return_final_state=final)  # noqa: E731
    assert_matches_reference(on(device, call), arguments, torch.float64, backend="triton")


def test_chunks_of_the_length_that_a_gpu_is_given_join(device) -> None:
    arguments = make_arguments((1, 67, 3, 2))
    arguments["seq_idx"] = torch.arange(67).unsqueeze(0) // 15
    assert_matches_reference(on(device, full_scan), arguments, torch.float32, backend="triton")


def test_more_channels_than_a_block(device) -> None:
    arguments = make_arguments((1, 3, 300, 3))
    arguments["seq_idx"] = torch.tensor([[1, 1, 0]], dtype=torch.int32)
    assert_matches_reference(on(device, full_scan), arguments, torch.float32, backend="triton")


def test_small_steps_keep_their_precision(device) -> None:
    delta = torch.linspace(-30, 45, 76).reshape(1, 4, 19).to(device)
    ones = torch.ones(1, 4, 1, device=device)
    arguments = {"u": torch.ones_like(delta), "A": torch.full((19, 1), -1e9, device=device), "B": ones, "C": ones}
    y = selective_scan(delta=delta, **arguments, delta_softplus=True, backend="triton")
    expected = torch.nn.functional.softplus(delta.double(), threshold=40)
    torch.testing.assert_close(y.double(), expected, rtol=5e-7, atol=0)


def test_length_zero_returns_the_initial_state_and_its_gradient(device) -> None:
    arguments = {k: v.to(device).requires_grad_() for k, v in make_arguments((2, 0, 3, 4)).items()}
    y, state = full_scan(**arguments, backend="triton")
    assert y.shape == (2, 0, 3)
    torch.testing.assert_close(state, arguments["initial_state"], rtol=0, atol=0)
    weights = torch.randn_like(state)
    *grads, grad_state = torch.autograd.grad(state, list(arguments.values()), weights)
    torch.testing.assert_close(grad_state, weights, rtol=0, atol=0)
    assert all((grad == 0).all() for grad in grads)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_inf_stay_in_their_channel_and_document(device, short_chunks, value) -> None:
    arguments = make_arguments((1, 30, 3, 3), leave_out=("z", "D"))
    arguments["u"][0, 11, 1] = value
    arguments = {k: v.to(device).requires_grad_() for k, v in arguments.items()}
    seq_idx = torch.zeros(1, 30, dtype=torch.int64, device=device)
    seq_idx[0, 21:] = 1
    outputs = [full_scan(**arguments, seq_idx=seq_idx, backend=backend) for backend in ("triton", "reference")]
    torch.testing.assert_close(*outputs, rtol=1e-12, atol=1e-12, equal_nan=True)
    assert outputs[0][0][0, 21:].isfinite().all()
    (grad,) = torch.autograd.grad(outputs[0][0][0, 21:].sum(), arguments["u"])
    assert grad[0, 21:].isfinite().all()
    assert (grad[:, :21] == 0).all()


@pytest.mark.filterwarnings("ignore::RuntimeWarning:triton")
def test_growing_states_that_are_zero_stay_zero_across_segments(device, short_chunks) -> None:
    arguments = make_arguments((1, 32, 2, 2), leave_out=("initial_state", "delta_bias"))
    # e²⁰ to e³⁰ a step: a few steps overflow float32.
    arguments["A"], arguments["delta"] = (
        torch.full_like(arguments["A"], 20),
        1 + torch.rand_like(arguments["delta"]) / 2,
    )
    arguments["u"][:, :31] = 0
    narrow = {name: value.float().to(device) for name, value in arguments.items()}
    outputs = [
        selective_scan(**narrow, return_final_state=True, backend=backend) for backend in ("triton", "reference")
    ]
    torch.testing.assert_close(*outputs, rtol=1e-5, atol=1e-5)


def test_kernels_give_the_same_bits_again(device, short_chunks) -> None:
    arguments = {k: v.float().to(device).requires_grad_() for k, v in make_arguments((2, 20, 3, 4)).items()}
    outputs = [full_scan(**arguments, backend="triton") for _ in range(2)]
    grads = [torch.autograd.grad(y.sum() + state.sum(), list(arguments.values())) for y, state in outputs]
    assert all(map(torch.equal, *outputs))
    assert all(map(torch.equal, *grads))


def test_without_gradients_no_states_are_kept_and_the_values_are_the_same(device, short_chunks) -> None:
    from neural_layers.kernels.selective_scan import triton_forward

    arguments = {k: v.to(device) for k, v in make_arguments((1, 11, 3, 4)).items()}
    expected = full_scan(**{k: v.requires_grad_() for k, v in arguments.items()}, backend="triton")
    with torch.no_grad():
        assert all(map(torch.equal, full_scan(**arguments, backend="triton"), expected))
    given = [arguments[name].detach() for name in ("u", "delta", "A", "B", "C")]
    assert triton_forward.forward(*given, *[None] * 5, True, False)[2].numel() == 0


def test_op_passes_the_checks_of_torch_and_is_traced(device) -> None:
    arguments = {k: v.to(device).requires_grad_() for k, v in make_arguments((2, 4, 3, 2)).items()}
    seq_idx = make_seq_idx(2, 4, seed=3).to(device)
    torch.library.opcheck(
        torch.ops.neural_layers.selective_scan.default, (*arguments.values(), seq_idx, True, "triton")
    )
    compiled = torch.compile(lambda kw: full_scan(**kw, backend="triton"), fullgraph=True, backend="aot_eager")
    arguments["seq_idx"] = seq_idx
    actual, expected = compiled(arguments), full_scan(**arguments, backend="triton")
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    grads = [torch.autograd.grad(y.sum() + state.sum(), arguments["u"])[0] for y, state in (actual, expected)]
    torch.testing.assert_close(*grads, rtol=0, atol=0)


def test_gradients_match_finite_differences(device) -> None:
    arguments = {k: v.to(device).requires_grad_() for k, v in make_arguments((1, 4, 2, 2)).items()}

    def call(*values):
        return full_scan(**dict(zip(arguments, values, strict=True)), backend="triton")

    assert torch.autograd.gradcheck(call, tuple(arguments.values()), fast_mode=True)


@pytest.mark.parametrize("softplus", [True, False])
@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("shape", [(3, 5, 4), (2, 300, 16), (1, 1, 1), (0, 3, 2), (2, 3, 17)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_step_matches_the_reference(device, dtype, shape, contiguous, softplus, poisoned_memory) -> None:
    batch, width, states = shape
    token = {k: v[:, 0] if v.ndim == 3 else v for k, v in make_arguments((batch, 1, width, states)).items()}
    token |= {"state": seeded(4)(batch, width, states)}
    del token["initial_state"]
    token |= {name: token[name].abs() for name in ("delta", "delta_bias")}
    token = {k: v.to(dtype) for k, v in token.items()}
    exact = {k: v.double() for k, v in token.items()}
    token = token if contiguous else {k: non_contiguous(v) for k, v in token.items()}
    for leave_out in ((), ("D", "z", "delta_bias")):
        token, exact = ({k: v for k, v in t.items() if k not in leave_out} for t in (token, exact))
        actual = on(device, selective_scan_step)(**token, delta_softplus=softplus, backend="triton")
        expected = selective_scan_step(**exact, delta_softplus=softplus, backend="reference")
        assert actual[0].dtype == dtype
        for out, ref in zip(actual, expected, strict=True):
            assert relative_error(out, ref) <= FORWARD[dtype]


def test_step_refuses_what_needs_a_gradient(device) -> None:
    token = {k: v[:, 0] if v.ndim == 3 else v for k, v in make_arguments((2, 1, 3, 4)).items()}
    token["state"] = torch.zeros(2, 3, 4).double().requires_grad_()
    del token["initial_state"]
    with pytest.raises(BackendError, match="the Triton step is for decoding"):
        selective_scan_step(**{k: v.to(device) for k, v in token.items()}, backend="triton")
