"""ssd_scan: values, gradients and the laws of a recurrence."""

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from neural_layers.kernels.selective_scan import selective_scan
from neural_layers.kernels.ssd_scan import ssd_scan
from tests.op_checks import Arguments, assert_matches_reference, non_contiguous, relative_error, seeded
from tests.tolerances import FORWARD

BACKENDS = ["torch"]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
OPTIONAL = ["D", "z", "dt_bias", "initial_state"]
LENGTHS = st.sampled_from([1, 2, 3, 7, 31, 32, 33, 64, 71])
CHUNKS = st.sampled_from([1, 2, 5, 16, 64, 100])
# Numbers that come back, negative ones, and one that no neighbour shares: six documents.
SEQ_IDX = [0, 0, 0, 1, 1, -5, -5, -5, -5, 0, 7, 0, 0, 0, 0]
Shape = tuple[int, int, int, int, int, int]


def make_arguments(shape: Shape, seed: int = 0, leave_out: tuple[str, ...] = ()) -> Arguments:
    batch, length, groups, heads_of_group, width, states = shape
    normal, heads = seeded(seed), groups * heads_of_group
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


def make_seq_idx(batch: int, length: int, seed: int) -> Tensor:
    """Short documents with few numbers, so that numbers come back."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(-1, 2, (batch, (length + 3) // 4), generator=generator).repeat_interleave(4, dim=1)[:, :length]


def part(arguments: Arguments, t0: int, t1: int) -> Arguments:
    """The arguments of tokens t0…t1."""
    timed = ("x", "dt", "B", "C", "z", "seq_idx")
    return {name: value[:, t0:t1] if name in timed else value for name, value in arguments.items()}


def full_scan(**arguments):
    return ssd_scan(**arguments, dt_softplus=True, return_final_state=True)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1, 1), (3, 33, 2, 2, 5, 4), (0, 3, 1, 2, 2, 2), (2, 300, 1, 3, 4, 16)])
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
    groups=st.integers(1, 3),
    heads_of_group=st.integers(1, 3),
    width=st.integers(1, 5),
    states=st.integers(1, 5),
    chunk_size=CHUNKS,
    leave_out=st.sets(st.sampled_from(OPTIONAL)),
    softplus=st.booleans(),
    packed=st.booleans(),
    seed=st.integers(0, 99),
)
def test_backend_matches_reference_with_any_options(
    backend, batch, length, groups, heads_of_group, width, states, chunk_size, leave_out, softplus, packed, seed
) -> None:
    arguments = make_arguments((batch, length, groups, heads_of_group, width, states), seed, tuple(leave_out))
    if not softplus:
        arguments["dt"] = arguments["dt"].abs()
        arguments |= {"dt_bias": arguments["dt_bias"].abs()} if "dt_bias" in arguments else {}
    if packed:
        arguments["seq_idx"] = make_seq_idx(batch, length, seed).to(torch.int32)
    options = {"dt_softplus": softplus, "chunk_size": chunk_size}
    for final in (False, True):
        call = lambda **kw: ssd_scan(**kw, **options, return_final_state=final)  # noqa: B023, E731
        assert_matches_reference(call, arguments, torch.float64, backend=backend)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@given(leave_out=st.sets(st.sampled_from(["D", "z", "dt_bias", "initial_state"])), seed=st.integers(0, 99))
def test_one_head_of_width_one_is_the_selective_scan_with_one_decay(backend, leave_out, seed) -> None:
    given = make_arguments((2, 9, 1, 1, 1, 3), seed, tuple(leave_out))
    flat = {
        "u": given["x"][..., 0],
        "delta": given["dt"],
        "A": given["A"].expand(1, 3),
        "B": given["B"][:, :, 0],
        "C": given["C"][:, :, 0],
        "D": given.get("D"),
        "z": None if "z" in leave_out else given["z"][..., 0],
        "delta_bias": given.get("dt_bias"),
        "initial_state": None if "initial_state" in leave_out else given["initial_state"][:, 0],
    }
    y, state = full_scan(**given, backend=backend)
    expected = selective_scan(**flat, delta_softplus=True, return_final_state=True, backend="reference")
    torch.testing.assert_close((y[..., 0], state[:, 0]), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("leave_out", OPTIONAL)
@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_argument_left_out_drops_out_of_the_formula(backend, leave_out) -> None:
    arguments = make_arguments((2, 5, 1, 2, 3, 2))
    if leave_out == "z":
        neutral = torch.full_like(arguments["z"], 1e4)  # silu(10⁴) = 10⁴ exactly
        expected = ssd_scan(**{**arguments, "z": neutral}, backend=backend) / 1e4
    else:
        neutral = torch.zeros_like(arguments[leave_out])
        expected = ssd_scan(**{**arguments, leave_out: neutral}, backend=backend)
    del arguments[leave_out]
    torch.testing.assert_close(ssd_scan(**arguments, backend=backend), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_length_zero_returns_the_initial_state(backend) -> None:
    arguments = make_arguments((2, 0, 1, 3, 2, 4))
    state = arguments["initial_state"].requires_grad_()
    y, final_state = ssd_scan(**arguments, return_final_state=True, backend=backend)
    assert y.shape == (2, 0, 3, 2)
    torch.testing.assert_close(final_state, state, rtol=0, atol=0)
    weight = torch.randn_like(final_state)
    torch.testing.assert_close(torch.autograd.grad((final_state * weight).sum(), state)[0], weight)
    with torch.no_grad():
        torch.testing.assert_close(ssd_scan(**arguments, return_final_state=True, backend=backend)[1], state)
    del arguments["initial_state"]
    assert ssd_scan(**arguments, return_final_state=True, backend=backend)[1].abs().max() == 0


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("packed", [False, True])
@given(first=st.integers(0, 40), second=st.integers(0, 40), chunk_size=CHUNKS, seed=st.integers(0, 99))
def test_a_split_at_any_token_gives_the_same_values_and_gradients(packed, first, second, chunk_size, seed, backend):
    arguments = make_arguments((2, 81, 2, 1, 3, 2), seed) | {"chunk_size": chunk_size, "backend": backend}
    if packed:
        arguments["seq_idx"] = make_seq_idx(2, 81, seed)
        # The initial state belongs to the document of its first token, so a split must not fall on a border.
        for cut in (first, first + second):
            arguments["seq_idx"][:, cut] = arguments["seq_idx"][:, max(cut - 1, 0)]
    tensors = [value for value in arguments.values() if isinstance(value, Tensor)]
    leaves = [value.requires_grad_() for value in tensors if value.is_floating_point()]
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


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
@given(length=st.integers(1, 20), leave_out=st.sets(st.sampled_from(OPTIONAL)), seed=st.integers(0, 99))
def test_token_by_token_without_gradient_equals_the_scan(backend, dtype, length, leave_out, seed) -> None:
    arguments = make_arguments((2, length, 2, 2, 3, 4), seed, tuple(leave_out))
    arguments = {name: non_contiguous(value.to(dtype)) for name, value in arguments.items()}
    wide = {name: value.double() for name, value in arguments.items()}
    expected, expected_state = full_scan(**wide, backend="reference")
    state = arguments.pop("initial_state", None)
    with torch.no_grad():
        for t in range(length):
            before = None if state is None else state.clone()
            y, new_state = full_scan(**part(arguments, t, t + 1), initial_state=state, backend=backend)
            assert relative_error(y, expected[:, t : t + 1]) <= FORWARD[dtype]
            if state is not None:
                assert torch.equal(state, before)
            state = new_state
    assert relative_error(state, expected_state) <= FORWARD[dtype]


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_documents_packed_in_a_row_equal_documents_alone(backend) -> None:
    arguments = make_arguments((1, len(SEQ_IDX), 1, 2, 3, 2))
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
def test_mixed_dtypes_keep_each_gradient_in_its_inputs_dtype(backend) -> None:
    dtypes = {"x": torch.bfloat16, "z": torch.float16, "B": torch.bfloat16, "initial_state": torch.bfloat16}
    arguments = {
        name: value.to(dtypes.get(name, torch.float32)).requires_grad_()
        for name, value in make_arguments((2, 35, 1, 3, 2, 4)).items()
    }
    y, state = full_scan(**arguments, backend=backend)
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    grads = torch.autograd.grad((y, state), list(arguments.values()), (torch.ones_like(y), torch.ones_like(state)))
    assert [grad.dtype for grad in grads] == [value.dtype for value in arguments.values()]
    wide = {name: value.double() for name, value in arguments.items()}
    assert full_scan(**wide, backend=backend)[1].dtype == torch.float64


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scale", [0.01, 1.0, 30.0, 1e4])
def test_decays_of_any_strength_keep_their_precision(scale, backend) -> None:
    arguments = make_arguments((1, 200, 1, 4, 3, 4), leave_out=("z",))
    arguments["A"] *= scale
    assert_matches_reference(full_scan, arguments, torch.float32, backend=backend)


@pytest.mark.parametrize("backend", BACKENDS)
def test_tokens_after_strong_decays_keep_their_precision(backend) -> None:
    arguments = make_arguments((1, 64, 1, 4, 3, 4), leave_out=("z", "dt_bias"))
    arguments["dt"] = torch.full((1, 64, 4), -4.0, dtype=torch.float64)
    arguments["dt"][:, :30] = 60.0
    assert_matches_reference(full_scan, arguments, torch.float32, backend=backend)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_a_decay_without_bound_leaves_each_token_to_itself(backend, dtype) -> None:
    arguments = {name: value.to(dtype) for name, value in make_arguments((2, 70, 2, 2, 3, 4), leave_out=("z",)).items()}
    arguments["A"] = torch.full((4,), -torch.inf, dtype=dtype)
    alone = {name: value for name, value in arguments.items() if name != "initial_state"}
    for length in (70, 1):
        y, _ = full_scan(**part(arguments, 0, length), backend=backend)
        for t in range(length):
            expected, _ = full_scan(**part(alone, t, t + 1), backend="reference")
            assert relative_error(y[:, t : t + 1], expected) <= FORWARD[dtype]


@pytest.mark.parametrize("packed", [False, True])
def test_rows_that_run_one_after_another_equal_rows_together(packed, monkeypatch) -> None:
    arguments = make_arguments((3, 40, 1, 2, 3, 4))
    leaves = [value.requires_grad_() for value in arguments.values()]
    arguments |= {"seq_idx": make_seq_idx(3, 40, 0)} if packed else {}
    results = []
    for cache in (1 << 20, 1):
        monkeypatch.setattr("neural_layers.kernels.ssd_scan.chunks.CACHE", cache)
        outputs = full_scan(**arguments, chunk_size=4, backend="torch")
        results += [(*outputs, *torch.autograd.grad(sum(out.square().sum() for out in outputs), leaves))]
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@given(seed=st.integers(0, 99), chunk_size=CHUNKS)
def test_states_that_grow_and_steps_of_either_sign_match_reference(backend, seed, chunk_size) -> None:
    arguments = make_arguments((2, 40, 1, 3, 2, 4), seed)
    arguments["A"] = -0.3 * arguments["A"].clamp_min(-1)
    call = lambda **kw: ssd_scan(**kw, return_final_state=True, chunk_size=chunk_size)  # noqa: E731
    assert_matches_reference(call, arguments, torch.float64, backend=backend)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_large_steps_forget_the_past_without_nan(backend) -> None:
    arguments = {name: value.float() for name, value in make_arguments((1, 70, 1, 3, 2, 4)).items()}
    arguments["dt"] = torch.full((1, 70, 3), 1e4)
    del arguments["z"], arguments["D"]
    y = ssd_scan(**arguments, backend=backend)
    drive = (arguments["dt"] + arguments["dt_bias"]).unsqueeze(-1) * arguments["x"]
    expected = drive * (arguments["B"] * arguments["C"]).sum(-1, keepdim=True)
    assert relative_error(y, expected) <= FORWARD[torch.float32]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["x", "dt", "B", "C", "z"])
@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_nan_and_inf_reach_what_depends_on_them_alone(backend, name, value) -> None:
    arguments = make_arguments((2, 90, 1, 2, 3, 2), leave_out=("D",) if name == "z" else ("z", "D"))
    arguments[name][0, 35, 0] = value
    seq_idx = torch.zeros(2, 90, dtype=torch.int64)
    seq_idx[0, 70:] = 1
    leaves = {key: arguments[key].requires_grad_() for key in ("x", "dt", "B", "C")}
    y, state = full_scan(**arguments, seq_idx=seq_idx, backend=backend)
    with torch.no_grad():
        expected = full_scan(**arguments, seq_idx=seq_idx, backend="reference")[0].isfinite()
    assert torch.equal(y.isfinite(), expected)
    assert not expected[0, 35, 0].any()
    assert expected[0, :35].all()
    assert expected[0, 70:].all()
    assert state.isfinite().all()
    grads = torch.autograd.grad(y[0, 70:].sum() + y[1].sum(), list(leaves.values()), retain_graph=True)
    assert all(grad[0, 70:].isfinite().all() and grad[1].isfinite().all() for grad in grads)
    grads = torch.autograd.grad(y.sum(), list(leaves.values()))
    # In its own document an output that is not finite reaches back, but never forward into the next one.
    assert all(grad[0, 70:].isfinite().all() and grad[1].isfinite().all() for grad in grads)


@pytest.mark.parametrize("backend", [*BACKENDS, "reference"])
def test_a_gradient_that_is_nan_reaches_no_later_token(backend) -> None:
    arguments = make_arguments((1, 60, 1, 2, 3, 2))
    x = arguments["x"].requires_grad_()
    weight = torch.ones(1, 60, 2, 3, dtype=torch.float64)
    weight[0, 30, 0, 1] = float("nan")
    y, _ = full_scan(**arguments, backend=backend)
    (grad,) = torch.autograd.grad(y, x, weight)
    assert grad[0, :31, 0, 1].isnan().all()
    grad[0, :31, 0, 1] = 0
    assert grad.isfinite().all()


def test_scan_keeps_its_precision_under_autocast() -> None:
    arguments = {name: value.float() for name, value in make_arguments((1, 40, 1, 3, 2, 4)).items()}
    arguments["x"].requires_grad_()
    run = lambda: (full_scan(**arguments), torch.autograd.grad(full_scan(**arguments)[0].sum(), arguments["x"]))  # noqa: E731
    expected = run()
    with torch.no_grad():
        expected_token = full_scan(**part(arguments, 0, 1)), full_scan(**arguments)
    with torch.autocast("cpu", torch.bfloat16):
        torch.testing.assert_close(run(), expected, rtol=0, atol=0)
        with torch.no_grad():
            actual = full_scan(**part(arguments, 0, 1)), full_scan(**arguments)
    torch.testing.assert_close(actual, expected_token, rtol=0, atol=0)
