"""flash_attention on the backend `triton`: values, gradients, documents and what no query may see."""

import itertools
from functools import partial

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from neural_layers.kernels.dispatch import BackendError
from neural_layers.kernels.flash_attention import flash_attention
from neural_layers.kernels.flash_attention.triton_choice import triton_avoid
from tests.op_checks import Arguments, assert_matches_reference, relative_error, seeded
from tests.tolerances import FORWARD, GRADIENT
from tests.triton.checks import on

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# (B, T, S, G, M, K, V): odd lengths, T below and above S, one query, no queries, no keys, nothing at all.
SIZES = [(2, 17, 17, 2, 3, 8, 5), (1, 9, 5, 1, 2, 17, 17), (2, 1, 9, 2, 1, 1, 3), (1, 1, 1, 1, 1, 1, 1)]
EMPTY = [(0, 3, 3, 1, 2, 4, 4), (1, 0, 4, 1, 2, 4, 4), (1, 3, 0, 1, 2, 4, 4), (1, 3, 4, 1, 2, 4, 0)]
# More rows and keys than a block has in any dtype, and neither a whole number of blocks.
LONG = (1, 50, 150, 1, 3, 8, 8)


def make_arguments(sizes: tuple[int, ...], seed: int = 0) -> Arguments:
    B, T, S, G, M, K, V = sizes
    normal = seeded(seed)
    return {"q": normal(B, T, G * M, K), "k": normal(B, S, G, K), "v": normal(B, S, G, V)}


def random_mask(B: int, S: int, seed: int, share: float = 0.7) -> Tensor:
    return torch.rand(B, S, generator=torch.Generator().manual_seed(seed)) < share


def random_documents(B: int, S: int, seed: int) -> Tensor:
    """Documents of random lengths; numbers come back."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(B, S, generator=generator) < 0.06).cumsum(dim=1) % 3


def all_options(arguments: Arguments) -> Arguments:
    """ALiBi, softcap and sinks; the slopes as learned ones are, small beside one over the distances."""
    heads, normal = arguments["q"].shape[2], seeded(4)
    return {"alibi_slopes": 0.02 * normal(heads).abs(), "sinks": normal(heads), "softcap": 1.5}


@pytest.mark.parametrize("contiguous", [True, False])
@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_kernels_match_the_reference_in_value_and_gradient(device, dtype, sizes, contiguous, poisoned_memory) -> None:
    arguments = make_arguments(sizes)
    for options in ({"causal": True, "window": 3}, {"scale": 0.5, **all_options(arguments)}):
        call = on(device, flash_attention)
        assert_matches_reference(call, arguments | options, dtype, backend="triton", contiguous=contiguous)


@pytest.mark.parametrize("sizes", EMPTY)
def test_empty_tensors_give_empty_or_zero_values_and_gradients(device, sizes, poisoned_memory) -> None:
    arguments = make_arguments(sizes)
    for options in ({"causal": True}, all_options(arguments)):
        assert_matches_reference(on(device, flash_attention), arguments | options, torch.float32, backend="triton")


OPTIONS = [
    {"causal": True},
    {"causal": True, "window": 60},
    {"window": 90},
    {"causal": True, "packed": True},
    {"packed": True, "masked": True},
    {"causal": True, "window": 70, "packed": True, "masked": True, "full": True},
    {"full": True},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_several_blocks_match_the_reference_in_value_and_gradient(device, dtype, options, poisoned_memory) -> None:
    arguments = make_arguments(LONG)
    S, given = LONG[2], dict(options)
    if given.pop("packed", False):
        arguments["seq_idx"] = random_documents(1, S, 2)
    if given.pop("masked", False):
        arguments["key_padding_mask"] = random_mask(1, S, 3)
    if given.pop("full", False):
        arguments |= all_options(arguments)
    assert_matches_reference(on(device, flash_attention), arguments | given, dtype, backend="triton")


@pytest.mark.parametrize("widths", [(40, 72), (130, 20)])
@pytest.mark.parametrize("dtype", DTYPES)
def test_wide_heads_match_the_reference_in_value_and_gradient(device, dtype, widths) -> None:
    """More columns than are multiplied at a time without matrix units, in the last step fewer than a step has."""
    arguments = make_arguments((1, 20, 40, 1, 1, *widths)) | {"causal": True}
    assert_matches_reference(on(device, flash_attention), arguments, dtype, backend="triton")


@pytest.mark.parametrize("causal", [True, False])
def test_queries_before_the_first_key_match_the_reference(device, causal) -> None:
    arguments = make_arguments((1, 90, 40, 1, 2, 8, 8)) | {"causal": causal, "window": 30}
    assert_matches_reference(on(device, flash_attention), arguments, torch.float32, backend="triton")


@st.composite
def calls(draw) -> Arguments:
    B, G, M = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 3))
    T, S, seed = draw(st.integers(1, 40)), draw(st.integers(1, 80)), draw(st.integers(0, 99))
    widths = draw(st.sampled_from([1, 7, 16, 33])), draw(st.sampled_from([1, 5, 16, 17]))
    arguments = make_arguments((B, T, S, G, M, *widths), seed)
    arguments |= {"causal": draw(st.booleans()), "window": draw(st.none() | st.integers(1, 60))}
    arguments |= {"softcap": draw(st.none() | st.floats(0.5, 60)), "scale": draw(st.none() | st.floats(-1, 1))}
    if draw(st.booleans()):
        arguments["alibi_slopes"] = seeded(seed + 1)(G * M) / 10
    if draw(st.booleans()):
        arguments["sinks"] = seeded(seed + 2)(G * M)
    if draw(st.booleans()):
        arguments["key_padding_mask"] = random_mask(B, S, seed, draw(st.sampled_from([0.1, 0.9])))
    if T <= S and draw(st.booleans()):
        arguments["seq_idx"] = random_documents(B, S, seed).to(draw(st.sampled_from([torch.int32, torch.int64])))
    return arguments


@settings(max_examples=8)
@given(arguments=calls(), dtype=st.sampled_from([torch.float64, torch.float32]))
def test_any_options_match_the_reference_in_value_and_gradient(device, arguments, dtype) -> None:
    assert_matches_reference(on(device, flash_attention), arguments, dtype, backend="triton")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{"causal": True}, {"window": 2}])
def test_query_without_keys_gives_zeros_and_finite_gradients(device, dtype, options) -> None:
    tensors = {k: x.to(device, dtype).requires_grad_() for k, x in make_arguments((2, 40, 30, 1, 2, 8, 8)).items()}
    mask = torch.ones(2, 30, dtype=torch.bool, device=device)
    mask[0] = False
    out = flash_attention(**tensors, **options, key_padding_mask=mask, backend="triton")
    assert (out[0] == 0).all()
    assert (out[1, -1] != 0).any()
    if "causal" in options:
        assert (out[1, :10] == 0).all()  # they stand before the first key
    for grad in torch.autograd.grad(out.sum(), list(tensors.values())):
        assert grad.isfinite().all()
        assert (grad[0] == 0).all()


def test_sinks_alone_give_zeros(device) -> None:
    tensors = {k: x.to(device) for k, x in make_arguments((1, 3, 4, 1, 2, 8, 8)).items()}
    sinks = torch.tensor([1.0, float("-inf")], dtype=torch.float64, device=device, requires_grad=True)
    mask = torch.zeros(1, 4, dtype=torch.bool, device=device)
    out = flash_attention(**tensors, sinks=sinks, key_padding_mask=mask, backend="triton")
    assert (out == 0).all()
    assert (torch.autograd.grad(out.sum(), sinks)[0] == 0).all()


@pytest.mark.parametrize("options", [{"causal": True}, {}, {"causal": True, "window": 9}])
def test_packed_documents_equal_documents_alone(device, options) -> None:
    tensors = {k: x.to(device) for k, x in make_arguments((1, 120, 120, 1, 2, 8, 8)).items()}
    seq_idx = torch.tensor([7] * 50 + [2] + [7] * 69, device=device).unsqueeze(0)

    def gradients(tensors: Arguments, **more: Tensor) -> list[Tensor]:
        given = {k: x.detach().requires_grad_() for k, x in tensors.items()}
        out = flash_attention(**given, **options, **more, backend="triton")
        return [out, *torch.autograd.grad(out.square().sum(), list(given.values()))]

    packed = gradients(tensors, seq_idx=seq_idx)
    for start, end in itertools.pairwise([0, 50, 51, 120]):
        alone = gradients({name: x[:, start:end] for name, x in tensors.items()})
        for whole, part in zip(packed, alone, strict=True):
            assert relative_error(whole[:, start:end], part) <= GRADIENT[torch.float64]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("options", [{"causal": True}, {"causal": True, "window": 9}, {"packed": True}, {}])
def test_nan_and_infinity_come_out_as_in_the_reference(device, special, dtype, options) -> None:
    arguments = {name: x.to(device, dtype) for name, x in make_arguments((1, 40, 40, 1, 2, 16, 16)).items()}
    if "packed" in options:
        options = {"seq_idx": (torch.arange(40, device=device) // 15).unsqueeze(0)}
    for name in ("q", "k"):
        spoiled = arguments[name].clone()
        spoiled[0, 20, 0] = special
        tensors = arguments | {name: spoiled}
        out = flash_attention(**tensors, **options, backend="triton")
        expected = flash_attention(**tensors, **options, backend="reference")
        assert torch.equal(out.isnan(), expected.isnan())
        seen = ~expected.isnan()
        assert relative_error(out[seen], expected[seen].double()) <= FORWARD[dtype]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_garbage_in_padding_changes_nothing(device) -> None:
    arguments = {name: x.to(device) for name, x in make_arguments((2, 9, 9, 1, 2, 8, 8)).items()}
    mask = random_mask(2, 9, 1).to(device)
    filled = {name: torch.where(mask[..., None, None], arguments[name], -1e30).requires_grad_() for name in "kv"}
    call = partial(flash_attention, causal=True, key_padding_mask=mask)
    out = call(**arguments | filled, backend="triton")
    assert relative_error(out, call(**arguments, backend="reference")) <= FORWARD[torch.float64]
    for grad in torch.autograd.grad(out.sum(), list(filled.values())):
        assert (grad[~mask] == 0).all()
        assert grad.isfinite().all()


@pytest.mark.parametrize(("softcap", "scale"), [(0.1, 0.3), (50.0, 1e-3), (50.0, 1.0), (50.0, 30.0)])
def test_softcap_keeps_its_digits_for_small_and_large_scores(device, softcap, scale) -> None:
    arguments = make_arguments((1, 60, 200, 1, 1, 16, 16), seed=3) | {"softcap": softcap, "scale": scale}
    assert_matches_reference(on(device, flash_attention), arguments, torch.float32, backend="triton")


def test_gradient_that_is_one_number_expanded_is_taken(device) -> None:
    tensors = {k: x.to(device).requires_grad_() for k, x in make_arguments((1, 9, 9, 1, 2, 8, 8)).items()}
    grad = torch.ones((), dtype=torch.float64, device=device).expand(1, 9, 2, 8)
    results = [
        torch.autograd.grad(flash_attention(**tensors, causal=True, backend=backend), list(tensors.values()), grad)
        for backend in ("triton", "reference")
    ]
    for actual, expected in zip(*results, strict=True):
        assert relative_error(actual, expected) <= GRADIENT[torch.float64]


def test_kernels_give_the_same_bits_again(device) -> None:
    arguments = make_arguments((1, 30, 70, 2, 2, 8, 8))
    arguments |= all_options(arguments)
    tensors = {k: x.float().to(device).requires_grad_() for k, x in arguments.items() if isinstance(x, Tensor)}
    outputs = [flash_attention(**tensors, softcap=1.5, causal=True, backend="triton") for _ in range(2)]
    grads = [torch.autograd.grad(out.square().sum(), list(tensors.values())) for out in outputs]
    assert torch.equal(*outputs)
    assert all(map(torch.equal, *grads))


def test_op_passes_the_checks_of_torch_and_is_traced(device) -> None:
    arguments = {k: x.to(device).requires_grad_() for k, x in make_arguments((1, 5, 6, 1, 2, 4, 4)).items()}
    slopes, sinks = (torch.rand(2, dtype=torch.float64, device=device, requires_grad=True) for _ in range(2))
    seq_idx = torch.tensor([[0, 0, 1, 1, 1, 2]], device=device)
    tensors = (*arguments.values(), slopes, sinks, None, seq_idx, None)
    custom = torch.ops.neural_layers.flash_attention.default
    torch.library.opcheck(custom, (*tensors, True, 3, 0.5, None, 0.0, None, "triton"))
    options = {"alibi_slopes": slopes, "sinks": sinks, "seq_idx": seq_idx, "causal": True, "backend": "triton"}
    compiled = torch.compile(lambda kw: flash_attention(**kw, **options), fullgraph=True, backend="aot_eager")
    actual, expected = compiled(arguments), flash_attention(**arguments, **options)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    leaves = [*arguments.values(), slopes, sinks]
    for a, b in zip(*(torch.autograd.grad(out.sum(), leaves) for out in (actual, expected)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_gradients_match_finite_differences(device) -> None:
    arguments = make_arguments((1, 4, 6, 1, 2, 3, 2))
    arguments |= {name: x for name, x in all_options(arguments).items() if isinstance(x, Tensor)}
    leaves = tuple(x.to(device).requires_grad_() for x in arguments.values())

    def call(*values: Tensor) -> Tensor:
        given = dict(zip(arguments, values, strict=True))
        return flash_attention(**given, softcap=0.8, window=3, backend="triton")

    assert torch.autograd.gradcheck(call, leaves, fast_mode=True)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"dropout_p": 0.1}, "draw no dropout"),
        ({"chunk_size": 4}, "chunk_size asks"),
        ({"q": torch.ones(1, 3, 2, 257), "k": torch.ones(1, 3, 1, 257)}, "up to a width of 256"),
        ({"v": torch.ones(1, 3, 1, 257)}, "up to a width of 256"),
    ],
)
def test_what_the_kernels_do_not_take_is_refused_in_words(device, options, reason) -> None:
    arguments = {"q": torch.ones(1, 3, 2, 4), "k": torch.ones(1, 3, 1, 4), "v": torch.ones(1, 3, 1, 4)} | options
    arguments = {k: x.to(device) if isinstance(x, Tensor) else x for k, x in arguments.items()}
    with pytest.raises(BackendError, match=reason):
        flash_attention(**arguments, backend="triton")


PLAIN = {
    "causal": False, "window": None, "alibi_slopes": None, "scale": None, "softcap": None, "sinks": None,
    "key_padding_mask": None, "seq_idx": None, "dropout_p": 0.0, "chunk_size": None,
}  # fmt: skip


@pytest.mark.parametrize(
    ("T", "options", "leaves_to_sdpa"),
    [
        (6, {}, True),
        (6, {"causal": True}, False),
        (8, {"causal": True}, True),
        (1, {"causal": True, "window": 3}, True),
        (8, {"causal": True, "window": 8}, True),
        (8, {"causal": True, "window": 7}, False),
        (8, {"softcap": 1.0}, False),
        (8, {"sinks": torch.ones(2)}, False),
        (8, {"alibi_slopes": torch.ones(2)}, False),
        (8, {"seq_idx": torch.zeros(1, 8, dtype=torch.int32)}, False),
        (8, {"key_padding_mask": torch.ones(1, 8, dtype=torch.bool)}, False),
    ],
)
def test_auto_leaves_to_sdpa_what_needs_no_mask(monkeypatch, T, options, leaves_to_sdpa) -> None:
    monkeypatch.setattr("neural_layers.kernels.triton_support.interpreting", lambda: False)
    q, k = torch.ones(1, T, 2, 4), torch.ones(1, 8, 1, 4)
    reason = triton_avoid(q, k, k, **PLAIN | options)
    assert (reason == "torch's own attention kernels are made for a call without a mask") == leaves_to_sdpa
    assert leaves_to_sdpa or reason is None
