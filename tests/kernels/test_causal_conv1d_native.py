"""causal_conv1d in C: dtypes, layouts, documents, states, threads, infinity and NaN, and what torch asks of an op."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import neural_layers
from neural_layers.kernels import c_library
from neural_layers.kernels.causal_conv1d import causal_conv1d, fused
from tests.op_checks import Arguments, assert_matches_reference, relative_error, seeded
from tests.tolerances import FORWARD

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(not c_library.VARIANT, reason="the C kernels are not built on this machine"),
]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def make_arguments(batch: int, length: int, width: int, taps: int, seed: int = 0) -> Arguments:
    normal = seeded(seed)
    return {
        "x": normal(batch, length, width),
        "weight": normal(width, taps),
        "bias": normal(width),
        "initial_state": normal(batch, taps - 1, width),
    }


def make_seq_idx(batch: int, length: int, seed: int, dtype: torch.dtype = torch.int64) -> Tensor:
    """Short documents with few numbers, so that numbers come back."""
    generator = torch.Generator().manual_seed(seed)
    seq_idx = torch.randint(-1, 2, (batch, (length + 1) // 2), generator=generator, dtype=dtype)
    return seq_idx.repeat_interleave(2, dim=1)[:, :length].contiguous()


def silu_conv(backend: str = "native", **arguments):
    return causal_conv1d(**arguments, activation="silu", return_final_state=True, backend=backend)


def value_and_gradients(arguments: Arguments, backend: str = "native", **options) -> list[Tensor]:
    floats = {k: v.detach().clone().requires_grad_() for k, v in arguments.items()}
    outputs = silu_conv(backend=backend, **floats, **options)
    grads = [torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out.dtype) for out in outputs]
    return [*(out.detach() for out in outputs), *torch.autograd.grad(outputs, list(floats.values()), grads)]


# More than a tile of channels, more than a task of rows, fewer rows than taps, no batch, and one to six taps.
SHAPES = [(1, 1, 1, 1), (2, 9, 5, 4), (0, 3, 2, 4), (3, 2, 4, 6), (1, 71, 259, 4), (2, 67, 3, 2), (5, 30, 2, 3)]


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_convolution_matches_reference_in_value_and_gradient(dtype, shape, contiguous, poisoned_memory) -> None:
    arguments = make_arguments(*shape)
    assert_matches_reference(silu_conv, arguments, dtype, backend="native", contiguous=contiguous)
    arguments["seq_idx"] = make_seq_idx(*shape[:2], seed=1)
    assert_matches_reference(silu_conv, arguments, dtype, backend="native", contiguous=contiguous)


@given(
    batch=st.integers(1, 3),
    length=st.integers(1, 90),
    width=st.integers(1, 4),
    taps=st.integers(1, 7),
    leave_out=st.sets(st.sampled_from(["bias", "initial_state"])),
    activation=st.sampled_from([None, "silu"]),
    documents=st.sampled_from([None, torch.int32, torch.int64]),
    want_final=st.booleans(),
    seed=st.integers(0, 99),
)
def test_convolution_matches_reference_with_any_options(
    batch, length, width, taps, leave_out, activation, documents, want_final, seed
) -> None:
    leave_out = leave_out | {"initial_state"} if taps == 1 else leave_out  # which then has no rows
    arguments = {k: v for k, v in make_arguments(batch, length, width, taps, seed).items() if k not in leave_out}
    if documents is not None:
        arguments["seq_idx"] = make_seq_idx(batch, length, seed, documents)
    call = lambda **kw: causal_conv1d(**kw, activation=activation, return_final_state=want_final)  # noqa: E731
    assert_matches_reference(call, arguments, torch.float64, backend="native")


@given(
    dtypes=st.fixed_dictionaries({name: st.sampled_from(DTYPES) for name in ("x", "weight", "bias", "initial_state")}),
    length=st.integers(0, 9),
)
def test_dtypes_may_be_mixed(dtypes, length) -> None:
    arguments = {name: value.to(dtypes[name]) for name, value in make_arguments(2, length, 5, 4).items()}
    actual, expected = value_and_gradients(arguments), value_and_gradients(arguments, "torch")
    for out, ref in zip(actual, expected, strict=True):
        assert out.dtype == ref.dtype
        torch.testing.assert_close(out, ref)


def test_parts_of_a_projection_and_a_turned_state_are_read_where_they_are() -> None:
    normal = seeded(2)
    both, state = normal(2, 7, 20), normal(2, 300, 3)
    weight, bias = normal(10, 4), normal(20)

    def call(both, state, backend):
        x, initial = both[..., 5:15], state[:, 7:17].transpose(1, 2)
        return silu_conv(x=x, weight=weight, bias=bias[::2], initial_state=initial, backend=backend)

    assert_matches_reference(call, {"both": both, "state": state}, torch.float64, backend="native")


@pytest.mark.parametrize("packed", [False, True])
@given(cut=st.integers(0, 80), seed=st.integers(0, 99))
def test_a_split_at_any_token_gives_the_same_values_and_gradients(packed, cut, seed) -> None:
    arguments = make_arguments(1, 80, 3, 4, seed)
    state, x = arguments.pop("initial_state").requires_grad_(), arguments.pop("x").requires_grad_()
    seq_idx = make_seq_idx(1, 80, seed) if packed else None
    if seq_idx is not None and 0 < cut < 80:
        seq_idx[:, cut] = seq_idx[:, cut - 1]  # the state belongs to the document of the first token that follows it

    def run(t0, t1, state):
        documents = None if seq_idx is None else seq_idx[:, t0:t1]
        return silu_conv(x=x[:, t0:t1], **arguments, initial_state=state, seq_idx=documents)

    whole = run(0, 80, state)
    first, middle = run(0, cut, state)
    second, last = run(cut, 80, middle)
    parts = torch.cat([first, second], dim=1), last
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-12)
    grads = [torch.autograd.grad(y.square().sum() + last.square().sum(), (x, state)) for y, last in (parts, whole)]
    torch.testing.assert_close(*grads, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("taps", [3, 4, 5])
def test_nan_and_infinity_come_out_as_in_the_reference(taps) -> None:
    arguments = {name: value.float() for name, value in make_arguments(2, 40, 3, taps).items()}
    special = torch.tensor([float("nan"), float("inf"), -float("inf"), -1e30, 1e30])
    arguments["x"][0, ::8] = special[:, None]
    arguments["initial_state"][1, 0, 0] = float("inf")
    seq_idx = make_seq_idx(2, 40, seed=3)
    for options in ({}, {"seq_idx": seq_idx}):
        actual, expected = (value_and_gradients(arguments, backend, **options) for backend in ("native", "reference"))
        for out, ref in zip(actual, expected, strict=True):
            torch.testing.assert_close(out, ref, equal_nan=True, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("sign", [1, -1])
def test_huge_inputs_saturate(sign) -> None:
    huge = sign * 10.0 ** torch.arange(3, 38.0).view(1, -1, 1)
    x, weight = huge.requires_grad_(), torch.ones(1, 1)
    y = causal_conv1d(x, weight, activation="silu", backend="native")
    assert torch.equal(y, huge if sign > 0 else torch.zeros_like(huge))
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], torch.full_like(x, max(sign, 0)))


def test_result_is_bit_identical_for_any_number_of_threads() -> None:
    arguments = {name: value.float() for name, value in make_arguments(3, 150, 300, 4).items()}
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(value_and_gradients(arguments))
    finally:
        torch.set_num_threads(1)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("length", [0, 1, 2, 7])
def test_final_state_alone_is_differentiable(length) -> None:
    arguments = {name: value.requires_grad_() for name, value in make_arguments(2, length, 3, 4).items()}
    names = ["x", "initial_state"]
    expected, actual = (
        torch.autograd.grad(
            silu_conv(backend, **arguments)[1].square().sum(), [arguments[n] for n in names], materialize_grads=True
        )
        for backend in ("reference", "native")
    )
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("dtype", DTYPES)
def test_length_zero_passes_the_state_and_its_gradient_on(dtype, poisoned_memory) -> None:
    arguments = {name: value.to(dtype).requires_grad_() for name, value in make_arguments(2, 0, 3, 4).items()}
    y, final = silu_conv(**arguments)
    assert y.shape == (2, 0, 3)
    torch.testing.assert_close(final, arguments["initial_state"], rtol=0, atol=0)
    grads = torch.autograd.grad((y.sum(), (3 * final).sum()), list(arguments.values()))
    for name, grad in zip(arguments, grads, strict=True):
        expected = torch.full_like(arguments[name], 3 if name == "initial_state" else 0)
        torch.testing.assert_close(grad, expected, rtol=0, atol=0)


@pytest.mark.parametrize("seq_idx", [None, torch.tensor([[0, 0, 1, 0, 0], [5, 5, 5, 5, 5]])])
def test_gradients_match_finite_differences(seq_idx) -> None:
    arguments = {name: value.requires_grad_() for name, value in make_arguments(2, 5, 2, 3).items()}

    def call(*values):
        return silu_conv(**dict(zip(arguments, values, strict=True)), seq_idx=seq_idx)

    assert torch.autograd.gradcheck(call, tuple(arguments.values()))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("want_final", [False, True])
def test_convolution_in_c_is_a_well_formed_op(packed, want_final) -> None:
    tensors = [tensor.requires_grad_() for tensor in make_arguments(2, 5, 6, 4).values()]
    seq_idx = make_seq_idx(2, 5, seed=0) if packed else None
    torch.library.opcheck(fused._forward, (*tensors, seq_idx, "silu", want_final, "native"))
    grads = torch.ones(2, 5, 6).double(), torch.ones(2, 3, 6).double() if want_final else None
    detached = [tensor.detach() for tensor in tensors]
    torch.library.opcheck(fused._backward, (*grads, *detached, seq_idx, "silu", "native"))


@pytest.mark.parametrize("dynamic", [False, True])
def test_convolution_is_traced_without_graph_break_and_exported(dynamic) -> None:
    compiled = torch.compile(lambda kw: silu_conv(**kw), fullgraph=True, backend="aot_eager", dynamic=dynamic)
    for length in (6, 11):
        arguments = make_arguments(2, length, 3, 4)
        x = arguments["x"].requires_grad_()
        arguments["seq_idx"] = make_seq_idx(2, length, seed=3)
        actual, expected = compiled(arguments), silu_conv(**arguments)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
        grads = [torch.autograd.grad(y.sum() + state.sum(), x)[0] for y, state in (actual, expected)]
        torch.testing.assert_close(*grads, rtol=0, atol=0)

    class Block(torch.nn.Module):
        def forward(self, x, weight, bias, initial_state, seq_idx):
            return silu_conv(x=x, weight=weight, bias=bias, initial_state=initial_state, seq_idx=seq_idx)

    arguments = {k: v.detach() for k, v in arguments.items()}
    axes = {k: {1: torch.export.Dim("length", min=4)} if k in ("x", "seq_idx") else None for k in arguments}
    exported = torch.export.export(Block(), (), arguments, dynamic_shapes=axes).module()
    longer = arguments | {k: torch.cat(2 * [arguments[k]], dim=1) for k in ("x", "seq_idx")}
    torch.testing.assert_close(exported(**longer), silu_conv(**longer), rtol=0, atol=0)


@given(
    batch=st.integers(0, 3),
    width=st.integers(0, 40),
    taps=st.integers(1, 6),
    dtype=st.sampled_from(DTYPES),
    activation=st.sampled_from([None, "silu"]),
    with_bias=st.booleans(),
)
def test_decoding_step_is_the_convolution_of_one_token(batch, width, taps, dtype, activation, with_bias) -> None:
    arguments = {name: value.to(dtype) for name, value in make_arguments(batch, 1, width, taps).items()}
    arguments["bias"] = arguments["bias"] if with_bias else None
    options = {"activation": activation, "return_final_state": True}
    expected = causal_conv1d(**arguments, **options, backend="reference")
    actual = causal_conv1d(**arguments, **options)
    for out, ref in zip(actual, expected, strict=True):
        assert out.dtype == ref.dtype
        assert relative_error(out, ref) <= FORWARD[dtype]


def test_decoding_step_passes_no_check_by() -> None:
    arguments = make_arguments(2, 1, 5, 4)
    for changes, error in (
        ({"activation": "gelu"}, ValueError),
        ({"initial_state": torch.ones(2, 4, 5)}, ValueError),
        ({"initial_state": torch.ones(3, 5)}, ValueError),
        ({"bias": torch.ones(4)}, ValueError),
        ({"weight": torch.ones(5, 4, dtype=torch.int32)}, TypeError),
    ):
        with pytest.raises(error):
            causal_conv1d(**(arguments | {"activation": None} | changes), return_final_state=True)
    with pytest.raises(neural_layers.BackendError, match="no backend 'tiles'"):
        silu_conv("tiles", **arguments)
    turned = arguments | {
        "weight": arguments["weight"].T.contiguous().T,
        "x": torch.stack([arguments["x"]] * 2, -1)[..., 0],
    }
    expected = silu_conv("reference", **arguments)
    torch.testing.assert_close(silu_conv("auto", **turned), expected)
    with neural_layers.use_backend(causal_conv1d="torch"):
        assert torch.equal(silu_conv("auto", **arguments)[0], silu_conv("torch", **arguments)[0])
    arguments["weight"].requires_grad_()
    y, _ = silu_conv("auto", **arguments)
    assert y.requires_grad


def test_gradient_of_the_gradient_is_refused_by_name() -> None:
    arguments = {name: value.requires_grad_() for name, value in make_arguments(1, 5, 2, 4).items()}
    (grad,) = torch.autograd.grad(silu_conv(**arguments)[0].sum(), arguments["x"], create_graph=True)
    with pytest.raises(NotImplementedError, match="no gradient of the gradient; use backend='torch'"):
        torch.autograd.grad(grad.sum(), arguments["x"])
