"""flash_attention as an op: dropout, memory, the blocks it visits, tracing, finite differences, bad arguments."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import neural_layers
from neural_layers.kernels import c_library, dispatch
from neural_layers.kernels.dispatch import BackendError
from neural_layers.kernels.flash_attention import flash_attention, fused, pytorch
from neural_layers.kernels.flash_attention.blocks import Visibility, key_blocks
from tests.op_checks import seeded

NOT_BUILT = pytest.mark.skipif(not c_library.VARIANT, reason="the C kernels are not built on this machine")
NATIVE = pytest.param("native", marks=[pytest.mark.native, NOT_BUILT])


def make_qkv(T: int, S: int, B: int = 1, H: int = 4, G: int = 2, width: int = 4) -> tuple[torch.Tensor, ...]:
    normal = seeded(T)
    shapes = (B, T, H, width), (B, S, G, width), (B, S, G, width)
    return tuple(normal(*shape).requires_grad_() for shape in shapes)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_dropout_keeps_the_mean_and_follows_the_seed(backend) -> None:
    q, k, _ = (x.detach() for x in make_qkv(40, 50, B=4))
    v = torch.eye(50, dtype=torch.float64).view(1, 50, 1, 50).expand(4, 50, 2, 50)  # the output is then P itself
    exact = flash_attention(q, k, v, backend="reference")
    torch.manual_seed(3)
    dropped = flash_attention(q, k, v, dropout_p=0.25, backend=backend)
    again = flash_attention(q, k, v, dropout_p=0.25, backend=backend)
    torch.manual_seed(3)
    assert torch.equal(flash_attention(q, k, v, dropout_p=0.25, backend=backend), dropped)
    assert not torch.equal(again, dropped)
    kept = dropped != 0
    torch.testing.assert_close(dropped[kept], exact[kept] / 0.75)
    assert abs(kept.double().mean() - 0.75) < 0.01  # 32,000 draws: a deviation of 0.0024
    assert abs(dropped.sum(-1).mean() - 1) < 0.02


def test_dropout_differs_between_blocks_and_heads() -> None:
    q, k = torch.zeros(1, 8, 2, 4), torch.zeros(1, 8, 1, 4)
    v = torch.eye(8).view(1, 8, 1, 8)
    out = flash_attention(q, k, v, dropout_p=0.5, chunk_size=4, backend="torch")
    blocks = [out[0, t : t + 4, h, s : s + 4] != 0 for t in (0, 4) for s in (0, 4) for h in (0, 1)]
    assert all(not torch.equal(a, b) for i, a in enumerate(blocks) for b in blocks[:i])


def test_gradient_under_dropout_matches_finite_differences() -> None:
    def call(*qkv: torch.Tensor) -> torch.Tensor:
        torch.manual_seed(5)
        return flash_attention(*qkv, dropout_p=0.3, causal=True, chunk_size=3, backend="torch")

    assert torch.autograd.gradcheck(call, make_qkv(5, 7))


OPTIONS = [
    {"causal": True},
    {"window": 2},
    {"causal": True, "window": 3, "key_padding_mask": torch.tensor([[True, False, True, True, False, True]])},
    {"seq_idx": torch.tensor([[0, 0, 1, 1, 1, 2]])},
]


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("backend", [NATIVE, "torch", "sdpa", "reference"])
def test_gradients_match_finite_differences(backend, options) -> None:
    assert torch.autograd.gradcheck(lambda *qkv: flash_attention(*qkv, **options, backend=backend), make_qkv(4, 6))


@pytest.mark.parametrize("backend", [NATIVE, "torch", "reference"])
def test_gradients_of_slopes_sinks_and_softcap_match_finite_differences(backend) -> None:
    normal = seeded(1)
    slopes, sinks = normal(4).abs().requires_grad_(), normal(4).requires_grad_()
    chunk_size = 2 if backend == "torch" else None

    def call(q, k, v, slopes, sinks):
        options = {"alibi_slopes": slopes, "sinks": sinks, "softcap": 0.8, "chunk_size": chunk_size}
        return flash_attention(q, k, v, **options, backend=backend)

    assert torch.autograd.gradcheck(call, (*make_qkv(3, 4), slopes, sinks))


def test_reference_differentiates_twice() -> None:
    inputs = make_qkv(3, 4)
    assert torch.autograd.gradgradcheck(lambda *x: flash_attention(*x, causal=True, backend="reference"), inputs)


@pytest.mark.parametrize("backend", [NATIVE, "torch"])
def test_second_gradient_is_refused(backend) -> None:
    q, k, v = make_qkv(3, 4)
    out = flash_attention(q, k, v, backend=backend)
    (first,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="no gradient of the gradient; use backend='reference'"):
        torch.autograd.grad(first.sum(), q)


@pytest.mark.parametrize("backend", [NATIVE, "torch"])
def test_backward_is_deterministic(backend) -> None:
    q, k, v = make_qkv(150, 150)
    runs = [
        torch.autograd.grad(flash_attention(q, k, v, causal=True, backend=backend).square().sum(), (q, k, v))
        for _ in range(2)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("everything", [False, True])
@pytest.mark.parametrize("backend", [NATIVE, "torch"])
def test_custom_ops_pass_opcheck(backend, everything) -> None:
    q, k, v = make_qkv(5, 7)
    tensors, numbers = (None,) * 5, (True, None, 0.5, None, 0.0, None)
    if everything:
        dropout = (torch.tensor(9), 0.2, 3) if backend == "torch" else (None, 0.0, None)
        mask, seq_idx = torch.rand(1, 7) > 0.3, torch.tensor([[0, 0, 1, 1, 1, 2, 2]])
        tensors = (torch.rand(4, requires_grad=True), torch.rand(4, requires_grad=True), mask, seq_idx, dropout[0])
        numbers = (False, 3, 0.5, 2.0, *dropout[1:])
    torch.library.opcheck(fused._forward, (q, k, v, *tensors, *numbers, backend))
    with torch.no_grad():
        out, lse = fused._forward(q, k, v, *tensors, *numbers, backend)
        arguments = (out.clone(), out, lse, q, k, v, *tensors, *numbers, everything, backend)
        plain = tuple(x.detach() if isinstance(x, torch.Tensor) else x for x in arguments)
    torch.library.opcheck(fused._backward, plain)


@pytest.mark.parametrize(
    "options",
    [{"causal": True}, {"causal": True, "window": 5}, {"softcap": 2.0}, {"dropout_p": 0.5}],
)
@pytest.mark.parametrize("library", [pytest.param(True, marks=[pytest.mark.native, NOT_BUILT]), False])
def test_op_is_traced_once_for_many_lengths(library, options, monkeypatch) -> None:
    if not library:
        without_library(monkeypatch)
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(lambda q, k, v: flash_attention(q, k, v, **options), fullgraph=True, backend=counter)
    for T in (20, 33, 47, 150, 301):
        results = []
        for function in (compiled, lambda q, k, v: flash_attention(q, k, v, **options)):
            torch.manual_seed(2)
            q, k, v = make_qkv(T, T)
            out = function(q, k, v)
            results.append((out, *torch.autograd.grad(out.square().sum(), (q, k, v))))
        torch.testing.assert_close(results[0], results[1])
    assert counter.frame_count <= 3  # a first length, then any; a window has one more case, beyond one block


@pytest.mark.parametrize("backend", [NATIVE, "torch", "sdpa"])
@pytest.mark.parametrize("window", [None, 20])
def test_no_tensor_of_queries_by_keys_is_saved(backend, window) -> None:
    T = 1024
    q, k, v = make_qkv(T, T)
    saved: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: saved.append(x.numel()) or x, lambda x: x):
        out = flash_attention(q, k, v, causal=True, window=window, backend=backend)
    out.sum().backward()
    assert saved
    assert max(saved) < T * T / 4


class LargestTensor(TorchDispatchMode):
    """Notes the elements of the largest tensor that any operation returns."""

    largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        sizes = [x.numel() for x in tree_leaves(out) if isinstance(x, torch.Tensor)]
        self.largest = max([self.largest, *sizes])
        return out


def test_no_tensor_of_queries_by_keys_is_built() -> None:
    q, k, v = (x.detach() for x in make_qkv(1024, 1024))
    numbers = (True, None, 0.5, 2.0, 0.1, 64)
    tensors = (q, k, v, torch.ones(4), torch.ones(4), torch.ones(1, 1024, dtype=torch.bool), None, torch.tensor(3))
    # The functions within the custom ops, because a dispatch mode does not look inside an op.
    with LargestTensor() as forward:
        out, lse = pytorch.forward(*tensors, *numbers)
    with LargestTensor() as backward:
        pytorch.backward(out, out, lse, *tensors, *numbers, True)
    block = 4 * 64 * 64  # H · C · C, here as large as q
    assert forward.largest == backward.largest == block


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("window", [None, 1, 3, 8, 40])
@pytest.mark.parametrize(("T", "S", "chunk"), [(30, 30, 4), (13, 29, 5), (29, 13, 6)])
def test_blocks_cover_every_visible_pair_and_nothing_hidden(T, S, chunk, window, causal) -> None:
    rule = Visibility(T, S, causal, window, None, None)
    allowed = rule.allowed(0, T, 0, S, torch.device("cpu"))
    visible = torch.ones(T, S, dtype=torch.bool) if allowed is None else allowed[0]
    visited = torch.zeros(T, S, dtype=torch.int)
    for t0 in range(0, T, chunk):
        for block in key_blocks(rule, t0, min(t0 + chunk, T), chunk):
            pairs = visible[block.t0 : block.t1, block.s0 : block.s1]
            assert pairs.any()
            assert block.full == bool(pairs.all())
            visited[block.t0 : block.t1, block.s0 : block.s1] += 1
    assert (visited[visible] == 1).all()


def without_library(monkeypatch) -> None:
    """As where the package was installed without a compiler, and the warning about it was given."""
    monkeypatch.setattr(c_library, "_LIBRARY", None)
    monkeypatch.setattr(dispatch, "_warned", {c_library.MISSING})


@NOT_BUILT
@pytest.mark.native
def test_explain_tells_why_the_c_kernels_run_or_do_not() -> None:
    q, k, v = make_qkv(9, 9)
    found = neural_layers.explain("flash_attention", q, k, v, causal=True, window=4, alibi_slopes=torch.ones(4))
    assert (found.backend, found.detail) == ("native", c_library.VARIANT)
    assert neural_layers.explain("flash_attention", q, k, v, causal=True).backend == "native"
    found = neural_layers.explain("flash_attention", q, k, v, dropout_p=0.1)
    assert (found.backend, found.reasons["native"]) == ("torch", "the C kernels draw no dropout")
    with pytest.raises(BackendError, match="chunk_size asks"):
        flash_attention(q, k, v, chunk_size=4, backend="native")


def test_explain_tells_the_choice_and_the_reasons_without_the_c_kernels(monkeypatch) -> None:
    without_library(monkeypatch)
    q, k, v = make_qkv(9, 9)
    found = neural_layers.explain("flash_attention", q, k, v, causal=True, window=4, alibi_slopes=torch.ones(4))
    assert found.backend == "torch"
    assert "alibi_slopes" in found.reasons["sdpa"]
    assert neural_layers.explain("flash_attention", q, k, v, causal=True, window=4).backend == "sdpa"
    long = torch.empty(1, 2048, 1, 4)
    found = neural_layers.explain("flash_attention", long, long, long, seq_idx=torch.zeros(1, 2048, dtype=torch.int32))
    assert found.backend == "torch"
    half = torch.empty(1, 9, 1, 4, dtype=torch.float16)
    found = neural_layers.explain("flash_attention", half, half, half)
    assert found.backend == "torch"
    assert "slow in float16" in found.reasons["sdpa"]
    with pytest.raises(BackendError, match="chunk_size bounds memory"):
        flash_attention(q, k, v, chunk_size=4, backend="reference")


Q, KV = torch.ones(1, 3, 4, 2), torch.ones(1, 5, 2, 2)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"window": 0}, ValueError, "window=0 must be at least 1"),
        ({"softcap": 0.0}, ValueError, "softcap=0.0 must be positive"),
        ({"dropout_p": 1.0}, ValueError, r"dropout_p=1.0 must lie in \[0, 1\)"),
        ({"chunk_size": 0}, ValueError, "chunk_size=0 must be at least 1"),
        ({"q": torch.ones(1, 3, 3, 2)}, ValueError, "H=3, must be a multiple .* G=2"),
        ({"q": torch.ones(1, 3, 4, 6)}, ValueError, r"k has shape \(1, 5, 2, 2\).*K=6"),
        ({"v": torch.ones(1, 4, 2, 2)}, ValueError, r"v has shape \(1, 4, 2, 2\).*S=5"),
        ({"q": torch.ones(3, 4, 2)}, ValueError, r"q has shape \(3, 4, 2\)"),
        ({"sinks": torch.ones(2)}, ValueError, r"sinks has shape \(2,\).*H=4"),
        ({"alibi_slopes": torch.ones(4, 1)}, ValueError, r"alibi_slopes has shape \(4, 1\)"),
        ({"alibi_slopes": torch.ones(4, dtype=torch.int64)}, TypeError, "alibi_slopes has dtype torch.int64"),
        ({"key_padding_mask": torch.ones(1, 5)}, TypeError, "key_padding_mask has dtype torch.float32.*torch.bool"),
        ({"key_padding_mask": torch.ones(1, 3, dtype=torch.bool)}, ValueError, r"key_padding_mask has shape \(1, 3\)"),
        ({"seq_idx": torch.ones(1, 5)}, TypeError, "seq_idx has dtype torch.float32"),
        ({"seq_idx": torch.ones(1, 3, dtype=torch.int64)}, ValueError, r"seq_idx has shape \(1, 3\).*S=5"),
        ({"q": torch.ones(1, 6, 4, 2), "seq_idx": torch.ones(1, 5, dtype=torch.int32)}, ValueError, "S=5.*T=6"),
        ({"q": Q.double()}, TypeError, "expected one dtype"),
        ({"backend": "cuda"}, BackendError, "no backend 'cuda'"),
    ],
)
def test_bad_arguments_are_named(changes, error, message) -> None:
    with pytest.raises(error, match=message):
        flash_attention(**({"q": Q, "k": KV, "v": KV} | changes))


@pytest.mark.parametrize("backend", [NATIVE, "torch"])
def test_autocast_does_not_reach_into_the_op(backend) -> None:
    normal = seeded(0)
    q, k, v = (normal(1, 9, 2, 4).float().requires_grad_() for _ in range(3))
    plain = flash_attention(q, k, v, causal=True, backend=backend)
    with torch.autocast("cpu", torch.bfloat16):
        inside = flash_attention(q, k, v, causal=True, backend=backend)
        gradients = torch.autograd.grad(inside.sum(), (q, k, v))
    assert torch.equal(inside, plain)
    for gradient, expected in zip(gradients, torch.autograd.grad(plain.sum(), (q, k, v)), strict=True):
        assert torch.equal(gradient, expected)
