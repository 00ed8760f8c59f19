"""flash_attention in C: tiles, spans, widths, layouts, documents, decoding, threads, NaN, and what is exported."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from neural_layers.kernels import c_library
from neural_layers.kernels.flash_attention import flash_attention
from tests.op_checks import assert_matches_reference, relative_error, seeded
from tests.tolerances import FORWARD, GRADIENT

pytestmark = [
    pytest.mark.native,
    pytest.mark.skipif(not c_library.VARIANT, reason="the C kernels are not built on this machine"),
]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def make_arguments(B: int, T: int, S: int, G: int, M: int, K: int, V: int, seed: int) -> dict:
    normal = seeded(seed)
    return {"q": normal(B, T, G * M, K), "k": normal(B, S, G, K), "v": normal(B, S, G, V)}


def random_documents(B: int, S: int, seed: int) -> Tensor:
    """Documents of random lengths; numbers come back."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(B, S, generator=generator) < 0.06).cumsum(dim=1) % 3


def value_and_gradients(tensors: dict, grad: Tensor, **options) -> list[Tensor]:
    given = {name: x.detach().requires_grad_() for name, x in tensors.items()}
    out = flash_attention(**given, **options)
    return [out.detach(), *torch.autograd.grad(out, list(given.values()), grad)]


WIDTHS = st.sampled_from([1, 3, 7, 8, 15, 16, 17, 32, 33, 48])


@st.composite
def calls(draw) -> dict:
    B, G, M = draw(st.integers(1, 2)), draw(st.integers(1, 2)), draw(st.integers(1, 5))
    T, S, seed = draw(st.integers(0, 150)), draw(st.integers(0, 250)), draw(st.integers(0, 99))
    arguments = make_arguments(B, T, S, G, M, draw(WIDTHS), draw(WIDTHS), seed)
    arguments |= {"causal": draw(st.booleans()), "window": draw(st.none() | st.integers(1, 120))}
    arguments |= {"softcap": draw(st.none() | st.floats(0.5, 60)), "scale": draw(st.none() | st.floats(-1, 1))}
    if S > 1 and draw(st.booleans()):
        arguments["farthest_bias"] = 10 * seeded(seed + 1)(G * M).abs()
    if draw(st.booleans()):
        arguments["sinks"] = seeded(seed + 2)(G * M)
    if draw(st.booleans()):
        share = draw(st.sampled_from([0.1, 0.9]))
        arguments["key_padding_mask"] = torch.rand(B, S, generator=torch.Generator().manual_seed(seed)) < share
    if T <= S and draw(st.booleans()):
        arguments["seq_idx"] = random_documents(B, S, seed)
    return arguments


def attention_of_farthest_bias(
    q: Tensor, k: Tensor, v: Tensor, farthest_bias: Tensor | None = None, **options
) -> Tensor:
    """flash_attention with the slopes given by their largest bias: the gradient of a slope is a sum of gradients of
    scores times distances, so that its rounding grows with the distances, in torch's own operations as well."""
    if farthest_bias is not None:
        options["alibi_slopes"] = farthest_bias / max(q.shape[1], k.shape[1], 1)
    return flash_attention(q, k, v, **options)


@settings(max_examples=60)
@given(arguments=calls(), dtype=st.sampled_from(DTYPES))
def test_any_options_match_reference_in_value_and_gradient(arguments, dtype) -> None:
    if {"farthest_bias", "sinks"} & arguments.keys() and dtype.itemsize == 2:
        # Every backend, and torch, takes the sum over all tokens from outputs that are rounded to the dtype.
        dtype = torch.float32
    assert_matches_reference(attention_of_farthest_bias, arguments, dtype, backend="native")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("options", [{"causal": True}, {"causal": True, "window": 100}, {"window": 40}, {}])
@pytest.mark.parametrize("seq_idx", [False, True])
def test_gradients_of_several_spans_match_reference(options, dtype, seq_idx, poisoned_memory) -> None:
    normal = seeded(3)
    arguments = make_arguments(1, 600, 700, 1, 3, 16, 32, 1) | options
    arguments |= {"alibi_slopes": 0.1 * normal(3).abs(), "sinks": normal(3)}
    if seq_idx:
        arguments["seq_idx"] = random_documents(1, 700, 2)
    assert_matches_reference(flash_attention, arguments, dtype, backend="native")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", [(4, 1), (2, 2), (1, 4)])
@pytest.mark.parametrize("width", [16, 80, 20])
def test_decoding_step_matches_reference(width, heads, dtype, poisoned_memory) -> None:
    G, M = heads
    normal = seeded(5)
    arguments = make_arguments(2, 1, 300, G, M, width, width, 4)
    mask = torch.rand(2, 300, generator=torch.Generator().manual_seed(1)) < 0.8
    extra = {"alibi_slopes": 0.01 * normal(G * M).abs(), "sinks": normal(G * M), "softcap": 3.0, "window": 250}
    for options in ({}, {"causal": True, "window": 7}, {"key_padding_mask": mask}, extra):
        assert_matches_reference(flash_attention, arguments | options, dtype, backend="native")


def test_keys_and_values_are_read_where_they_are(monkeypatch) -> None:
    normal = seeded(6)
    cache = normal(2, 2, 2, 90, 16)  # of keys and values, (B, G, S, K) each
    fused = normal(2, 20, 3, 64)
    q = fused[:, :, 1].unflatten(-1, (4, 16))
    k, v = cache[0].transpose(1, 2)[:, 10:], cache[1].transpose(1, 2)[:, 10:]
    expected = flash_attention(q, k, v, causal=True, backend="reference")
    monkeypatch.setattr(Tensor, "contiguous", lambda x: pytest.fail("copied"))
    out = flash_attention(q, k, v, causal=True, backend="native")
    assert relative_error(out, expected) <= FORWARD[torch.float64]


def test_gradient_that_is_one_number_expanded_is_taken() -> None:
    tensors = make_arguments(2, 70, 70, 2, 2, 8, 8, 7)
    for grad in (torch.ones(()).double().expand(2, 70, 4, 8), torch.ones(2, 70, 8, 4).double().transpose(2, 3)):
        actual = value_and_gradients(tensors, grad, causal=True, backend="native")
        expected = value_and_gradients(tensors, grad, causal=True, backend="reference")
        for a, b in zip(actual, expected, strict=True):
            assert relative_error(a, b) <= GRADIENT[torch.float64]


@pytest.mark.parametrize("options", [{"causal": True}, {"window": 60}])
def test_result_is_bit_identical_for_any_number_of_threads(options) -> None:
    tensors = {name: x.float() for name, x in make_arguments(1, 700, 700, 2, 2, 32, 32, 8).items()}
    tensors |= {"alibi_slopes": torch.rand(4), "sinks": torch.rand(4)}
    grad = seeded(9)(1, 700, 4, 32).float()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            results.append(value_and_gradients(tensors, grad, **options, backend="native"))
    finally:
        torch.set_num_threads(1)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("special", [float("nan"), float("inf"), -float("inf")])
def test_nan_and_infinity_come_out_as_in_the_reference(special, dtype) -> None:
    arguments = {name: x.to(dtype) for name, x in make_arguments(1, 40, 40, 1, 2, 16, 16, 2).items()}
    for name in ("q", "k"):
        spoiled = arguments[name].clone()
        spoiled[0, 20, 0] = special
        tensors = arguments | {name: spoiled}
        for options in ({"causal": True}, {"causal": True, "window": 9}, {}):
            out = flash_attention(**tensors, **options, backend="native")
            expected = flash_attention(**tensors, **options, backend="reference")
            assert torch.equal(out.isnan(), expected.isnan())
            seen = ~expected.isnan()
            assert relative_error(out[seen], expected[seen].double()) <= FORWARD[dtype]


@pytest.mark.parametrize(("softcap", "scale"), [(0.1, 1e-3), (0.1, 0.3), (50.0, 1e-3), (50.0, 1.0), (50.0, 30.0)])
def test_softcap_keeps_its_digits_for_small_and_large_scores(softcap, scale) -> None:
    arguments = make_arguments(1, 60, 200, 1, 1, 16, 16, 3) | {"softcap": softcap, "scale": scale}
    assert_matches_reference(flash_attention, arguments, torch.float32, backend="native")


def test_long_sequence_stays_within_the_tolerances_of_short_ones() -> None:
    arguments = make_arguments(1, 2048, 2048, 1, 1, 64, 64, 5)
    for options in ({"causal": True}, {}, {"alibi_slopes": torch.tensor([0.05], dtype=torch.float64)}):
        assert_matches_reference(flash_attention, arguments | options, torch.float32, backend="native")


def test_exported_graph_needs_no_c_library() -> None:
    class Attention(torch.nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return flash_attention(q, k, v, causal=True)

    tensors = tuple(x.float() for x in make_arguments(1, 12, 12, 1, 2, 8, 8, 1).values())
    length = torch.export.Dim("length", min=2)
    exported = torch.export.export(Attention(), tensors, dynamic_shapes=3 * ({1: length},))
    assert "native" not in exported.graph_module.code
    assert "scaled_dot_product" in exported.graph_module.code
    torch.testing.assert_close(exported.module()(*tensors), Attention()(*tensors))
