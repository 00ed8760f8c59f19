"""ssd_scan on the backend `triton`: values, gradients, states and documents against the reference."""

from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from neural_layers.kernels.dispatch import BackendError
from neural_layers.kernels.ssd_scan import ssd_scan
from tests.op_checks import Arguments, assert_matches_reference, seeded
from tests.triton.checks import on

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
OPTIONAL = ["D", "z", "dt_bias", "initial_state"]


def make_arguments(
    batch: int, length: int, heads: int, width: int, groups: int, states: int, seed: int = 0, leave_out: tuple = ()
) -> Arguments:
    normal = seeded(seed)
    arguments = {
        "x": normal(batch, length, heads, width),
        "dt": normal(batch, length, heads),
        "A": -normal(heads).exp(),
        "B": normal(batch, length, groups, states),
        "C": normal(batch, length, groups, states),
        "D": normal(heads),
        "z": normal(batch, length, heads, width),
        "dt_bias": normal(heads),
        "initial_state": normal(batch, heads, width, states),
    }
    return {name: value for name, value in arguments.items() if name not in leave_out}


def make_seq_idx(batch: int, length: int, seed: int) -> torch.Tensor:
    """Short documents with few numbers, so that numbers come back."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, 2, (batch, (length + 3) // 4), generator=generator).repeat_interleave(4, dim=1)[:, :length]


full_scan = partial(ssd_scan, dt_softplus=True, return_final_state=True)


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1, 1), (2, 19, 4, 5, 2, 3), (0, 3, 2, 2, 1, 2), (1, 16, 2, 17, 2, 33)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_match_the_reference_in_value_and_gradient(device, dtype, shape, contiguous, poisoned_memory) -> None:
    arguments = make_arguments(*shape)
    if contiguous:
        arguments["seq_idx"] = make_seq_idx(*shape[:2], seed=1)
    call = partial(full_scan, chunk_size=7)
    assert_matches_reference(on(device, call), arguments, dtype, backend="triton", contiguous=contiguous)


@settings(max_examples=5)
@given(
    batch=st.just(1) | st.integers(1, 2),
    length=st.sampled_from([1, 3, 16, 17]),
    shape=st.sampled_from([(1, 1, 1), (1, 18, 1), (2, 5, 2)]),
    states=st.sampled_from([1, 4, 17]),
    chunk_size=st.sampled_from([1, 5, 16]),
    leave_out=st.sets(st.sampled_from(OPTIONAL)),
    softplus=st.booleans(),
    packed=st.booleans(),
    final=st.booleans(),
    seed=st.integers(0, 99),
)
def test_kernels_match_the_reference_with_any_options(
    device, batch, length, shape, states, chunk_size, leave_out, softplus, packed, final, seed
) -> None:
    length = min(length, 3 * chunk_size)
    arguments = make_arguments(batch, length, *shape, states, seed, tuple(leave_out))
    if not softplus:
        arguments["dt"] = arguments["dt"].abs()
        arguments |= {"dt_bias": arguments["dt_bias"].abs()} if "dt_bias" in arguments else {}
    if packed:
        arguments["seq_idx"] = make_seq_idx(batch, length, seed).to(torch.int32)
    call = partial(ssd_scan, dt_softplus=softplus, return_final_state=final, chunk_size=chunk_size)
    assert_matches_reference(on(device, call), arguments, torch.float64, backend="triton")


@pytest.mark.parametrize("dtype", DTYPES)
def test_heads_of_the_usual_size_match_the_reference(device, dtype) -> None:
    """More columns of states than a program multiplies at a time, and two chunks of 64 tokens."""
    arguments = make_arguments(1, 100, 1, 80, 1, 130)
    arguments["seq_idx"] = torch.arange(100).unsqueeze(0) // 45
    assert_matches_reference(on(device, full_scan), arguments, dtype, backend="triton")


def test_length_zero_returns_the_initial_state_and_its_gradient(device) -> None:
    arguments = {k: v.to(device).requires_grad_() for k, v in make_arguments(2, 0, 2, 3, 1, 4).items()}
    y, state = full_scan(**arguments, backend="triton")
    assert y.shape == (2, 0, 2, 3)
    torch.testing.assert_close(state, arguments["initial_state"], rtol=0, atol=0)
    weights = torch.randn_like(state)
    *grads, grad_state = torch.autograd.grad(state, list(arguments.values()), weights)
    torch.testing.assert_close(grad_state, weights, rtol=0, atol=0)
    assert all((grad == 0).all() for grad in grads)


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize(("name", "end"), [("x", 11), ("B", 11), ("C", 11), ("x", 18), ("C", 18)])
def test_nan_and_inf_reach_no_earlier_token_and_no_other_document(device, name, end, value) -> None:
    """Also where the document ends within a later chunk, so that the state before that chunk is spoilt."""
    arguments = make_arguments(1, 20, 1, 3, 1, 4, leave_out=("z",))
    arguments[name][0, 6, 0, 1] = value
    arguments = {k: v.to(device).requires_grad_() for k, v in arguments.items()}
    seq_idx = torch.zeros(1, 20, dtype=torch.int64, device=device)
    seq_idx[0, 3:] = 1
    seq_idx[0, end:] = 2
    results = []
    for backend in ("triton", "reference"):
        y, state = full_scan(**arguments, seq_idx=seq_idx, chunk_size=16, backend=backend)
        grads = torch.autograd.grad(y.sum() + state.sum(), [arguments[k] for k in ("x", "dt", "B", "C")])
        results.append((y, state, *grads))
    assert not results[0][0].isfinite().all()
    for actual, expected in zip(*results, strict=True):
        assert torch.equal(actual.isfinite(), expected.isfinite())
        fine = expected.isfinite()
        torch.testing.assert_close(actual[fine], expected[fine], rtol=1e-11, atol=1e-11)


def test_kernels_give_the_same_bits_again(device) -> None:
    arguments = {k: v.float().to(device).requires_grad_() for k, v in make_arguments(1, 20, 4, 3, 2, 4).items()}
    outputs = [full_scan(**arguments, chunk_size=16, backend="triton") for _ in range(2)]
    grads = [torch.autograd.grad(y.sum() + state.sum(), list(arguments.values())) for y, state in outputs]
    assert all(map(torch.equal, *outputs))
    assert all(map(torch.equal, *grads))


def test_op_passes_the_checks_of_torch_and_is_traced(device) -> None:
    arguments = {k: v.to(device).requires_grad_() for k, v in make_arguments(1, 6, 1, 3, 1, 4).items()}
    seq_idx = make_seq_idx(1, 6, seed=3).to(device)
    custom = torch.ops.neural_layers.ssd_scan.default
    for keep in (True, False):
        given = {k: v.detach() if not keep else v for k, v in arguments.items()}
        torch.library.opcheck(custom, (*given.values(), seq_idx, True, 4, keep, "triton"))
    compiled = torch.compile(lambda kw: full_scan(**kw, backend="triton"), fullgraph=True, backend="aot_eager")
    arguments["seq_idx"] = seq_idx
    actual, expected = compiled(arguments), full_scan(**arguments, backend="triton")
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    grads = [torch.autograd.grad(y.sum() + state.sum(), arguments["x"])[0] for y, state in (actual, expected)]
    torch.testing.assert_close(*grads, rtol=0, atol=0)


def test_gradients_match_finite_differences(device) -> None:
    arguments = {k: v.to(device).requires_grad_() for k, v in make_arguments(1, 4, 1, 2, 1, 2).items()}

    def call(*values):
        return full_scan(**dict(zip(arguments, values, strict=True)), chunk_size=3, backend="triton")

    assert torch.autograd.gradcheck(call, tuple(arguments.values()), fast_mode=True)


@pytest.mark.parametrize(("width", "states", "chunk_size"), [(129, 2, 64), (2, 2, 65), (2, 0, 64)])
def test_what_the_kernels_do_not_take_is_refused_in_words(device, width, states, chunk_size) -> None:
    arguments = {k: v.to(device) for k, v in make_arguments(1, 2, 1, width, 1, states).items()}
    with pytest.raises(BackendError, match=r"above 64 or a head wider than 128|no entries"):
        ssd_scan(**arguments, chunk_size=chunk_size, backend="triton")
