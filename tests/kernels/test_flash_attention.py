"""flash_attention: every backend against the reference and against torch's own attention, and what no query may see."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from neural_layers.kernels import c_library
from neural_layers.kernels.dispatch import BackendError
from neural_layers.kernels.flash_attention import flash_attention
from tests.op_checks import assert_matches_reference, seeded
from tests.tolerances import FORWARD

NOT_BUILT = pytest.mark.skipif(not c_library.VARIANT, reason="the C kernels are not built on this machine")
NATIVE = pytest.param("native", marks=[pytest.mark.native, NOT_BUILT])
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# (B, T, S, H, G): odd lengths, T below and above S, one query, nothing at all.
SIZES = [(2, 17, 17, 6, 2), (2, 5, 13, 4, 4), (1, 9, 5, 2, 1), (2, 1, 9, 2, 2), (1, 1, 1, 1, 1)]
EMPTY = [(0, 3, 3, 2, 1), (1, 0, 4, 2, 1), (1, 3, 0, 2, 1)]


def make_arguments(sizes: tuple[int, int, int, int, int], seed: int, width: int = 8, value_width: int = 8) -> dict:
    B, T, S, H, G = sizes
    normal = seeded(seed)
    return {"q": normal(B, T, H, width), "k": normal(B, S, G, width), "v": normal(B, S, G, value_width)}


def random_mask(B: int, S: int, seed: int) -> Tensor:
    return torch.rand(B, S, generator=torch.Generator().manual_seed(seed)) > 0.3


def documents(B: int, S: int, length: int) -> Tensor:
    return (torch.arange(S) // length).expand(B, S).clone()


def chunked(chunk_size: int | None):
    """flash_attention with a chunk_size for the backend that has one."""

    def call(*, backend: str, **arguments):
        return flash_attention(**arguments, backend=backend, chunk_size=chunk_size if backend == "torch" else None)

    return call


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("sizes", SIZES + EMPTY)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", [NATIVE, "torch", "sdpa"])
def test_backends_match_reference_in_value_and_gradient(backend, dtype, sizes, contiguous, poisoned_memory) -> None:
    arguments = make_arguments(sizes, seed=0)
    for options in ({}, {"causal": True}, {"causal": True, "window": 3}, {"window": 2, "scale": 0.5}):
        call = chunked(4)
        assert_matches_reference(call, arguments | options, dtype, backend=backend, contiguous=contiguous)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", SIZES + EMPTY)
@pytest.mark.parametrize("backend", [NATIVE, "torch"])
def test_alibi_softcap_and_sinks_match_reference_in_value_and_gradient(backend, sizes, dtype, poisoned_memory) -> None:
    normal, heads = seeded(4), sizes[3]
    extra = {"alibi_slopes": normal(heads).abs(), "sinks": normal(heads), "softcap": 1.5, "causal": True}
    arguments = make_arguments(sizes, seed=3, value_width=5) | extra
    assert_matches_reference(chunked(4), arguments, dtype, backend=backend, contiguous=False)


@st.composite
def calls(draw, full: bool) -> dict:
    B, T, S, G = draw(st.integers(1, 2)), draw(st.integers(0, 12)), draw(st.integers(0, 12)), draw(st.integers(1, 2))
    H, seed = G * draw(st.integers(1, 3)), draw(st.integers(0, 99))
    widths = {"value_width": draw(st.integers(1, 6)), "width": draw(st.integers(1, 6))} if full else {}
    arguments = make_arguments((B, T, S, H, G), seed, **widths)
    arguments |= {"causal": draw(st.booleans()), "window": draw(st.none() | st.integers(1, 14))}
    arguments["scale"] = draw(st.none() | st.floats(-2, 2))
    if draw(st.booleans()):
        arguments["key_padding_mask"] = random_mask(B, S, seed)
    if T <= S and draw(st.booleans()):
        arguments["seq_idx"] = documents(B, S, draw(st.integers(1, 6)))
    if full:
        arguments["softcap"] = draw(st.none() | st.floats(0.5, 3))
        arguments |= {"alibi_slopes": seeded(seed)(H).abs()} if draw(st.booleans()) else {}
        arguments |= {"sinks": seeded(seed + 1)(H)} if draw(st.booleans()) else {}
    return arguments


@settings(max_examples=80)
@given(arguments=calls(full=True), chunk_size=st.none() | st.integers(1, 7))
def test_torch_backend_matches_reference_under_any_options(arguments, chunk_size) -> None:
    assert_matches_reference(chunked(chunk_size), arguments, torch.float64, backend="torch")


@settings(max_examples=60)
@given(arguments=calls(full=False))
def test_sdpa_backend_matches_reference_under_the_options_it_takes(arguments) -> None:
    assert_matches_reference(flash_attention, arguments, torch.float64, backend="sdpa")


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize(("T", "S", "window"), [(300, 300, 50), (270, 401, 7), (257, 129, 100), (700, 700, 600)])
@pytest.mark.parametrize("backend", [NATIVE, "torch", "sdpa"])
def test_long_windows_match_reference_across_blocks(backend, T, S, window, batch, causal) -> None:
    arguments = make_arguments((batch, T, S, 2, 1), seed=1) | {"window": window, "causal": causal}
    for mask in ({}, {"key_padding_mask": random_mask(batch, S, 5)}, {"seq_idx": documents(batch, S, 60)}):
        if T <= S or "seq_idx" not in mask:
            assert_matches_reference(flash_attention, arguments | mask, torch.float32, backend=backend)


@pytest.mark.parametrize("backend", [NATIVE, "torch", "sdpa", "reference"])
@pytest.mark.parametrize("causal", [False, True])
def test_window_equals_torch_attention_under_a_mask_written_by_hand(backend, causal) -> None:
    arguments = make_arguments((1, 6, 8, 4, 2), seed=2)
    rows = [[i + 2 - 2 <= j <= i + 2 + (0 if causal else 2) for j in range(8)] for i in range(6)]
    q, k, v = (arguments[name].transpose(1, 2) for name in "qkv")
    expected = scaled_dot_product_attention(q, k, v, attn_mask=torch.tensor(rows), enable_gqa=True).transpose(1, 2)
    out = flash_attention(**arguments, causal=causal, window=3, backend=backend)
    torch.testing.assert_close(out, expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("backend", [NATIVE, "torch", "sdpa", "reference"])
@pytest.mark.parametrize("options", [{}, {"causal": True}, {"window": 2}, {"causal": True, "window": 200}])
def test_query_without_keys_gives_zeros_and_finite_gradients(backend, dtype, options) -> None:
    arguments = make_arguments((2, 240, 230, 2, 1), seed=2)
    tensors = {name: x.to(dtype).requires_grad_() for name, x in arguments.items()}
    mask = torch.ones(2, 230, dtype=torch.bool)
    mask[0] = False
    out = flash_attention(**tensors, **options, key_padding_mask=mask, backend=backend)
    assert (out[0] == 0).all()
    assert (out[1, -1] != 0).any()
    if "causal" in options:
        assert (out[1, :10] == 0).all()  # they stand before the first key
    for grad in torch.autograd.grad(out.sum(), list(tensors.values())):
        assert grad.isfinite().all()
        assert (grad[0] == 0).all()


@pytest.mark.parametrize("backend", [NATIVE, "torch", "reference"])
def test_sinks_alone_give_zeros(backend) -> None:
    arguments = make_arguments((1, 3, 4, 2, 1), seed=2)
    sinks = torch.tensor([1.0, float("-inf")], dtype=torch.float64, requires_grad=True)
    mask = torch.zeros(1, 4, dtype=torch.bool)
    out = flash_attention(**arguments, sinks=sinks, key_padding_mask=mask, backend=backend)
    assert (out == 0).all()
    assert (torch.autograd.grad(out.sum(), sinks)[0] == 0).all()


@pytest.mark.parametrize("backend", [NATIVE, "torch", "sdpa", "reference"])
def test_padding_garbage_changes_nothing(backend) -> None:
    arguments = make_arguments((2, 9, 9, 2, 1), seed=2)
    mask = random_mask(2, 9, 1)
    garbage = arguments | {
        name: torch.where(mask[..., None, None], arguments[name], -1e30).requires_grad_() for name in "kv"
    }
    out = flash_attention(**garbage, causal=True, key_padding_mask=mask, backend=backend)
    expected = flash_attention(**arguments, causal=True, key_padding_mask=mask, backend="reference")
    torch.testing.assert_close(out, expected)
    for grad in torch.autograd.grad(out.sum(), (garbage["k"], garbage["v"])):
        assert (grad[~mask] == 0).all()
        assert grad.isfinite().all()


@pytest.mark.parametrize("backend", [NATIVE, "torch", "sdpa", "reference"])
@pytest.mark.parametrize("options", [{"causal": True}, {}, {"causal": True, "window": 3}])
def test_packed_documents_equal_documents_alone(backend, options) -> None:
    arguments = make_arguments((1, 12, 12, 4, 2), seed=6)
    borders = [0, 5, 6, 12]
    seq_idx = torch.tensor([[7] * 5 + [2] + [9] * 6])
    packed = flash_attention(**arguments, **options, seq_idx=seq_idx, backend=backend)
    for start, end in itertools.pairwise(borders):
        alone = {name: x[:, start:end] for name, x in arguments.items()}
        torch.testing.assert_close(packed[:, start:end], flash_attention(**alone, **options, backend=backend))


@pytest.mark.parametrize("slope", [0.5, 0.3, 2.0**-8])
@pytest.mark.parametrize("backend", [NATIVE, "torch"])
def test_alibi_is_exact_at_length_8192(backend, slope) -> None:
    T, chosen = 8192, torch.tensor([0, 1, 127, 128, 4097, 8191])
    arguments = {name: x.float() for name, x in make_arguments((1, T, T, 1, 1), seed=8).items()}
    out = flash_attention(**arguments, alibi_slopes=torch.tensor([slope]), causal=True, backend=backend)[0, chosen, 0]
    q, k, v = (arguments[name][0, :, 0].double() for name in "qkv")
    distance = chosen[:, None] - torch.arange(T)
    score = (q[chosen] @ k.T * 8**-0.5 - torch.tensor(slope).double() * distance).masked_fill(distance < 0, -torch.inf)
    assert (out.double() - score.softmax(-1) @ v).abs().max() <= 2 * FORWARD[torch.float32]


@pytest.mark.parametrize("backend", [NATIVE, "torch", "reference"])
def test_alibi_decays_with_the_distance_in_the_value_that_a_hand_computes(backend) -> None:
    q, k = torch.zeros(1, 1, 1, 4), torch.zeros(1, 3, 1, 4)
    v = torch.eye(3).view(1, 3, 1, 3)
    out = flash_attention(q, k, v, alibi_slopes=torch.tensor([0.7]), backend=backend)
    torch.testing.assert_close(out.flatten(), torch.tensor([-1.4, -0.7, 0.0]).softmax(0))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"alibi_slopes": torch.ones(2)}, "alibi_slopes would need a bias"),
        ({"softcap": 1.0}, "no softcap"),
        ({"sinks": torch.ones(2)}, "no sinks"),
        ({"chunk_size": 4}, "chunk_size asks"),
        ({"dropout_p": 0.1}, "for dropout"),
        ({"v": torch.ones(1, 3, 1, 5)}, "values are not as wide"),
    ],
)
def test_sdpa_refuses_what_it_does_not_serve(options, reason) -> None:
    arguments = {"q": torch.ones(1, 3, 2, 4), "k": torch.ones(1, 3, 1, 4), "v": torch.ones(1, 3, 1, 4)} | options
    with pytest.raises(BackendError, match=reason):
        flash_attention(**arguments, backend="sdpa")
    assert flash_attention(**arguments).isfinite().all()
